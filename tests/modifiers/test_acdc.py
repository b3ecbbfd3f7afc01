"""AC/DC: dense and pruned phases in turn."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import prunus
from prunus import Recipe
from prunus.modifiers import ACDC, Context
from prunus.modifiers.nm.maskings import SRSTE
from prunus.modifiers.schedules import Schedule
from prunus.modifiers.timing import Timeline, Window

from tests.helpers.training import sgd, train, two_layers

PER_EPOCH = 3


def modifier(sparsity=0.75, begin=1, end=9, every=2, **settings):
    window = Window(f"{begin}ep", f"{end}ep", f"{every}ep")
    return ACDC(sparsity=sparsity, layers=("0", "2"), window=window, **settings)


def bound(acdc):
    model = two_layers()
    return acdc.bind(Context(model, sgd(model), Timeline(PER_EPOCH)))


def is_dense(epoch, begin, end, every):
    """The rule of the published program: even phases, but for what begins too near to the end."""
    return (epoch - begin) // every % 2 == 0 and end - every > epoch


@settings(deadline=None)
@given(st.integers(0, 4), st.integers(1, 9), st.integers(1, 5))
def test_phases_are_those_of_the_published_program(begin, phases, every):
    end = begin + phases * every
    run = bound(modifier(begin=begin, end=end, every=every))
    assert run.ticks == [epoch * PER_EPOCH for epoch in range(begin, end + 1, every)]
    for tick, step in enumerate(run.ticks):
        assert run.dense(tick) == is_dense(step // PER_EPOCH, begin, end, every)


def test_the_plan_says_which_phases_are_dense():
    said = [what.split(",")[0] for _, what in bound(modifier()).timetable()]
    pruned = "magnitude to unstructured"
    assert said == ["dense", pruned, "dense", pruned, pruned]


def largest(weights, sparsity):
    flat = torch.cat([w.detach().abs().flatten() for w in weights])
    gone = flat.argsort(stable=True)[: round(sparsity * flat.numel())]
    keep = torch.ones_like(flat, dtype=torch.bool)
    keep[gone] = False
    return [
        k.view_as(w) for k, w in zip(keep.split([w.numel() for w in weights]), weights, strict=True)
    ]


@pytest.mark.parametrize("reset", [True, False])
def test_training_equals_the_algorithm_step_for_step(reset):
    mine, theirs = two_layers(), two_layers()
    optimizer = sgd(mine)
    recipe = Recipe((modifier(reset_momentum=reset),))
    steps = 10 * PER_EPOCH
    weights, plain = [theirs[0].weight, theirs[2].weight], sgd(theirs)
    masks = [torch.ones_like(w, dtype=torch.bool) for w in weights]

    @torch.no_grad()
    def alternate(step):
        epoch, start = divmod(step, PER_EPOCH)
        for w, mask in zip(weights, masks, strict=True):
            w.mul_(mask)
        if start or not (1 <= epoch <= 9) or (epoch - 1) % 2:
            return
        if is_dense(epoch, 1, 9, 2):
            if reset and epoch > 1:
                for w in weights:
                    plain.state[w]["momentum_buffer"].zero_()
            masks[:] = [torch.ones_like(mask) for mask in masks]
        else:
            masks[:] = largest(weights, 0.75)
            for w, mask in zip(weights, masks, strict=True):
                w.mul_(mask)
                plain.state[w]["momentum_buffer"].mul_(mask)

    train(theirs, plain, steps, after=alternate, seed=1)
    with prunus.attach(mine, optimizer, recipe, steps_per_epoch=PER_EPOCH) as session:
        train(mine, optimizer, steps, seed=1)
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    assert session.sparsity == 0.75
    dense = [e["step"] for e in session.recorder.events if e["event"] == "dense"]
    assert dense == [PER_EPOCH, 5 * PER_EPOCH]


def test_weights_come_back_in_dense_phases_only():
    model = two_layers()
    optimizer = sgd(model)
    session = prunus.attach(model, optimizer, Recipe((modifier(),)), steps_per_epoch=PER_EPOCH)
    zeros = {}

    def count(step):
        zeros[step] = sum(int((model[i].weight == 0).sum()) for i in (0, 2))

    train(model, optimizer, 10 * PER_EPOCH, after=count, seed=1)
    session.close()
    for step, count_ in zeros.items():
        pruned = 3 <= step // PER_EPOCH < 5 or step // PER_EPOCH >= 7
        if pruned:
            assert count_ == 144
        elif step != 5 * PER_EPOCH:  # the masks are lifted after this step
            assert count_ < 144
    assert zeros[7 * PER_EPOCH - 1] == zeros[PER_EPOCH] == 0


@pytest.mark.parametrize("stop", [2, 10, 16, 25])
def test_resuming_equals_the_uninterrupted_run(stop):
    recipe, steps = Recipe((modifier(),)), 30

    def attach(model, optimizer):
        return prunus.attach(model, optimizer, recipe, steps_per_epoch=PER_EPOCH)

    whole = two_layers()
    optimizer = sgd(whole)
    with attach(whole, optimizer):
        train(whole, optimizer, stop, seed=1)
        train(whole, optimizer, steps - stop, seed=2)
    parted = two_layers()
    optimizer = sgd(parted)
    session = attach(parted, optimizer)
    train(parted, optimizer, stop, seed=1)
    state, momentum = session.state_dict(), copy.deepcopy(optimizer.state_dict())
    again = copy.deepcopy(parted)
    optimizer = sgd(again)
    with attach(again, optimizer) as session:
        optimizer.load_state_dict(momentum)
        session.load_state_dict(state)
        train(again, optimizer, steps - stop, seed=2)
    for a, b in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


def test_closing_early_leaves_a_pruned_model():
    model = two_layers()
    optimizer = torch.optim.Adam(model.parameters())
    with prunus.attach(model, optimizer, Recipe((modifier(),)), steps_per_epoch=PER_EPOCH):
        train(model, optimizer, 16, seed=1)  # in the second dense phase
    assert sum(int((model[i].weight == 0).sum()) for i in (0, 2)) == 144


def test_a_finished_model_is_pruned_at_once():
    model = two_layers()
    prunus.prune(model, Recipe((modifier(),)))
    assert sum(int((model[i].weight == 0).sum()) for i in (0, 2)) == 144


def test_recipes_may_name_it():
    recipe = Recipe((modifier(reset_momentum=False),))
    assert "acdc" in recipe.to_yaml()
    assert Recipe.load(recipe.to_yaml()) == recipe
    with pytest.raises(ValueError, match="each phase is pruned to the same sparsity"):
        ACDC(sparsity=Schedule(0.1, 0.5))
    with pytest.raises(ValueError, match="no sparsity was given"):
        ACDC()
    two_of_four = ACDC(pattern="2:4", layers=("0",), window=Window("0ep", "4ep", "1ep"))
    assert bound(two_of_four).timetable()[1][1] == "magnitude to 2:4, sparsity 0.5000"


def test_n_of_m_training_is_another_entry():
    with pytest.raises(ValueError, match="ACDC masks hard; N:M training is NMTraining"):
        ACDC(pattern="2:4", masking=SRSTE())


BOTH = """
modifiers:
- prune: {layers: ['0'], sparsity: 0.25, window: {from: 1step}}
- acdc: {layers: ['0', '2'], sparsity: 0.75, window: {from: 2step, to: 10step, every: 2step}}
"""


@pytest.mark.parametrize("resumed_at", [None, 5, 7])
def test_dense_phases_leave_pruned_what_another_entry_pruned(resumed_at):
    model = two_layers()
    optimizer = sgd(model)
    session = prunus.attach(model, optimizer, BOTH)
    for step in range(1, 12):
        train(model, optimizer, 1)
        if step == 1:
            gone = model[0].weight == 0
            assert gone.float().mean() == pytest.approx(0.25, abs=0.01)
        if step == resumed_at:
            state = copy.deepcopy(session.state_dict())
            session.close(finish=False)
            session = prunus.attach(model, optimizer, BOTH)
            session.load_state_dict(state)
        assert bool((model[0].weight[gone] == 0).all())
        if step == 7:  # a dense phase: all others train again
            assert torch.equal(~session.masks["0.weight"], gone)
            assert bool(session.masks["2.weight"].all())
    session.close()
    assert session.sparsity == pytest.approx(0.75, abs=0.01)
