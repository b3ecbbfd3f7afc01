"""The recipe entry ``hold``: what is zero stays zero."""

import copy

import pytest
import torch
from torch import nn

import prunus
from prunus import Recipe
from prunus.modifiers import Context, Hold
from prunus.timing import Window


def sparse_model(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight[torch.rand_like(layer.weight) < 0.5] = 0
    return model


def train(model, optimizer, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 12, generator=generator)).square().mean().backward()
        optimizer.step()


def recipe(text="hold: {}"):
    return Recipe.load(f"modifiers:\n- {text}\n")


def test_zeros_stay_and_the_rest_is_trained():
    model, dense = sparse_model(), sparse_model()
    zeros = {name: p == 0 for name, p in model.named_parameters() if p.dim() == 2}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with prunus.attach(model, optimizer, recipe()) as session:
        train(model, optimizer, 5)
    for name, p in model.named_parameters():
        if name in zeros:
            assert torch.equal(p == 0, zeros[name])
            assert not torch.equal(p, dict(dense.named_parameters())[name])
    (held,) = [e for e in session.recorder.events if e["event"] == "hold"]
    assert (held["step"], held["sparsity"]) == (0, session.sparsity)
    assert session.sparsity == pytest.approx(0.5, abs=0.1)


def test_the_weights_that_are_held_take_plain_masked_steps():
    """Beside a loop that multiplies by the masks itself after each step."""
    model = sparse_model()
    twin = copy.deepcopy(model)
    masks = [(p, (p != 0)) for p in twin.parameters() if p.dim() == 2]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with prunus.attach(model, optimizer, recipe()):
        train(model, optimizer, 4)
    plain = torch.optim.SGD(twin.parameters(), lr=0.1)
    plain.register_step_post_hook(lambda *_: [p.data.mul_(mask) for p, mask in masks])
    train(twin, plain, 4)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_window_says_when_it_begins():
    model = sparse_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = prunus.attach(model, optimizer, recipe("hold: {window: {from: 2step}}"))
    train(model, optimizer, 2)
    assert len(session.masks) == 0
    dense = int((model[0].weight == 0).sum())
    assert dense < 20
    with torch.no_grad():
        model[0].weight[:4] = 0
    train(model, optimizer, 2)
    assert bool((model[0].weight[:4] == 0).all())
    assert session.runs[0].plan() == [(2, "hold the zeros of 2 layers")]
    with pytest.raises(ValueError, match="held until the session closes; drop 'to'"):
        Hold(window=Window("0ep", "3ep"))


def test_layers_can_be_chosen():
    model = sparse_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with prunus.attach(model, optimizer, recipe("hold: {exclude: ['2']}")) as session:
        train(model, optimizer, 1)
    assert list(session.masks) == ["0.weight"]
    other = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"the optimizer does not hold 2\.weight"):
        Hold().bind(Context(model, other))


def test_what_is_pruned_later_is_the_pruning_entrys():
    model = sparse_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    text = "hold: {}\n- prune: {sparsity: 0.8, layers: ['0'], window: {from: 2step}}"
    with prunus.attach(model, optimizer, recipe(text)) as session:
        train(model, optimizer, 4)
    assert 1 - session.masks["0.weight"].float().mean().item() == pytest.approx(0.8, abs=0.01)
    assert torch.equal(model[0].weight != 0, session.masks["0.weight"])
    assert torch.equal(model[2].weight != 0, session.masks["2.weight"])


@pytest.mark.parametrize("stop", [1, 3])
def test_resuming_equals_the_uninterrupted_run(stop):
    def run(model, optimizer, steps, state=None, seed=1):
        session = prunus.attach(model, optimizer, recipe())
        if state is not None:
            session.load_state_dict(state)
        train(model, optimizer, steps, seed)
        return session

    whole = sparse_model()
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    run(whole, optimizer, stop).close(finish=False)
    run(whole, optimizer, 2, seed=2)
    parted = sparse_model()
    optimizer = torch.optim.SGD(parted.parameters(), lr=0.1)
    first = run(parted, optimizer, stop)
    state = first.state_dict()
    first.close(finish=False)
    with torch.no_grad():  # a zero that is none of the mask's stays trainable
        kept = state["masks"]
    assert set(kept) == {"0.weight", "2.weight"}
    second = run(parted, optimizer, 2, state, seed=2)
    assert second.step == stop + 2
    for mine, theirs in zip(parted.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)
