"""Movement pruning: scores summed up over the steps of training."""

import copy

import pytest
import torch
from torch import nn

import prunus
from prunus import Recipe
from prunus.api.arguments import as_allocator
from prunus.modifiers import Context, MovementPruning
from prunus.modifiers.schedules import Schedule
from prunus.modifiers.timing import Window

from tests.helpers.training import sgd, train, two_layers

PER_EPOCH = 3


def fit(model, optimizer, steps, seed=1, **more):
    train(model, optimizer, steps, seed=seed, rows=8, target=1.0, **more)


def modifier(**settings):
    schedule, window = Schedule(0.25, 0.75, "linear"), Window("1ep", "3ep", "1ep")
    return MovementPruning(
        **{"sparsity": schedule, "layers": ("0", "2"), "window": window, **settings}
    )


def attach(model, optimizer, *modifiers):
    return prunus.attach(
        model, optimizer, Recipe(modifiers or (modifier(),)), steps_per_epoch=PER_EPOCH
    )


def zeros(layer):
    return int((layer.weight == 0).sum())


@pytest.mark.parametrize("allocator", ["uniform", "global"])
def test_training_equals_the_scores_of_the_paper_step_for_step(allocator):
    mine, theirs = two_layers(torch.float64), two_layers(torch.float64)
    chosen = as_allocator(allocator)
    optimizer = sgd(mine)
    session = attach(mine, optimizer, modifier(allocator=chosen))
    fit(mine, optimizer, 12)
    session.close()

    plain, weights = sgd(theirs), [theirs[0].weight, theirs[2].weight]
    moved = [torch.zeros_like(w) for w in weights]
    masks = [torch.ones_like(w, dtype=torch.bool) for w in weights]

    def score():
        for s, w in zip(moved, weights, strict=True):
            s.sub_(w.detach() * w.grad)

    def lowest(sparsity):
        alive = [torch.where(m, s, -torch.inf) for s, m in zip(moved, masks, strict=True)]
        groups = [alive] if allocator == "global" else [[a] for a in alive]
        keeps = []
        for group in groups:
            flat = torch.cat([a.flatten() for a in group])
            keep = torch.ones_like(flat, dtype=torch.bool)
            keep[flat.argsort(stable=True)[: round(sparsity * flat.numel())]] = False
            keeps += keep.split([a.numel() for a in group])
        return [k.view_as(w) for k, w in zip(keeps, weights, strict=True)]

    @torch.no_grad()
    def prune(step):
        for w, mask in zip(weights, masks, strict=True):
            w.mul_(mask)
        if step in (3, 6, 9):
            masks[:] = lowest({3: 0.25, 6: 0.5, 9: 0.75}[step])
            for w, mask in zip(weights, masks, strict=True):
                w.mul_(mask)
                plain.state[w]["momentum_buffer"].mul_(mask)

    fit(theirs, plain, 12, before=score, after=prune)
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_shrinks_goes_even_if_it_is_large():
    """Two weights of one layer: the large one is pulled to zero, the small one is pushed away."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[2.0, 0.1]]))
    target = torch.tensor([[0.5, 1.0]])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    half = modifier(sparsity=0.5, layers=("0",), window=Window("4step"))
    with attach(model, optimizer, half):
        for _ in range(4):
            optimizer.zero_grad()
            (model[0].weight - target).square().sum().backward()
            optimizer.step()
    assert model[0].weight[0, 0] == 0
    assert model[0].weight[0, 1] > 0.1


@pytest.mark.parametrize("stop", [2, 5, 10])
def test_resuming_equals_the_uninterrupted_run(stop):
    whole = two_layers()
    optimizer = sgd(whole)
    with attach(whole, optimizer):
        fit(whole, optimizer, stop)
        fit(whole, optimizer, 12 - stop, seed=2)
    parted = two_layers()
    optimizer = sgd(parted)
    session = attach(parted, optimizer)
    fit(parted, optimizer, stop)
    state, momentum = copy.deepcopy(session.state_dict()), copy.deepcopy(optimizer.state_dict())
    session.close(finish=False)
    optimizer = sgd(parted)
    with attach(parted, optimizer) as session:
        optimizer.load_state_dict(momentum)
        session.load_state_dict(state)
        fit(parted, optimizer, 12 - stop, seed=2)
    for a, b in zip(parted.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)
    assert session.runs[0].moved == {}


def test_weights_of_half_precision_are_summed_in_single():
    model = two_layers(torch.bfloat16)
    optimizer = sgd(model)
    session = attach(model, optimizer)
    fit(model, optimizer, 2)
    assert {t.dtype for t in session.runs[0].moved.values()} == {torch.float32}
    fit(model, optimizer, 8)
    assert (zeros(model[0]), zeros(model[2])) == (96, 48)


def test_steps_that_a_scaler_skips_do_not_count_and_scales_are_taken_off():
    model = two_layers()
    optimizer = sgd(model)
    run = attach(model, optimizer).runs[0]
    weight = model[0].weight
    weight.grad = torch.full_like(weight, torch.inf)
    optimizer.found_inf = torch.tensor(1.0)
    run.before_update(0)
    assert run.moved == {}
    weight.grad = torch.full_like(weight, 8.0)
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(0.0), torch.tensor(4.0)
    run.before_update(0)
    assert torch.equal(run.moved["0"], -2 * weight.detach())


@pytest.mark.parametrize("pattern", ["row", "2:4", "4x1"])
def test_patterns_are_met(pattern):
    model = two_layers()
    optimizer = sgd(model)
    sparsity = None if pattern == "2:4" else 0.5
    allocator = None if pattern == "2:4" else as_allocator("uniform")
    entry = modifier(sparsity=sparsity, pattern=pattern, allocator=allocator, window=Window("1ep"))
    with attach(model, optimizer, entry):
        fit(model, optimizer, 6)
    assert (zeros(model[0]), zeros(model[2])) == (64, 32)


def test_recipes_may_name_it_and_one_shot_runs_may_not():
    recipe = Recipe((modifier(),))
    assert Recipe.load(recipe.to_yaml()) == recipe
    with pytest.raises(ValueError, match="movement pruning watches training"):
        prunus.prune(two_layers(), recipe)
    with pytest.raises(ValueError, match="pruner 'magnitude' goes into an entry 'prune'"):
        modifier(pruner=prunus.Magnitude())
    with pytest.raises(ValueError, match="sequential and permute mean nothing"):
        modifier(sequential=True)
    model = two_layers()
    context = Context(model, torch.optim.SGD(model.parameters(), 0.1))
    run = MovementPruning(sparsity=0.5).bind(context)
    assert run.timetable() == [(0, "movement to unstructured, sparsity 0.5000")]
