"""A step that raises is still due: at the next step, when closing, and when closing again."""

import pytest
import torch
from torch import nn

import prunus
from prunus.modifiers.nm.layer_state import NMLayerState

ENTRIES = {
    "gradual": "prune: {pruner: wanda, sparsity: {from: 0.25, to: 0.5}, "
    "window: {from: 1step, to: 3step, every: 1step}}",
    "at once": "prune: {pruner: wanda, sparsity: 0.5, window: {from: 2step}}",
    "acdc": "acdc: {pruner: wanda, sparsity: 0.5, window: {from: 0step, to: 3step, every: 1step}}",
}
"""each prunes half in the end, the last time after step 3 at the latest"""


class Failing:
    """Batches that cannot be read while ``broken``."""

    def __init__(self):
        self.broken = False

    def __iter__(self):
        if self.broken:
            raise KeyboardInterrupt
        return iter([torch.randn(8, 8)])


def attached(entry):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    batches = Failing()
    data = prunus.Calibration(batches)
    session = prunus.attach(model, optimizer, f"modifiers: [{{{entry}}}]", calibration=data)
    return model, optimizer, session, batches


def train(model, optimizer, batches=None, broken=()):
    for number in range(1, 6):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()
        if batches is not None:
            batches.broken = number in broken
        try:
            optimizer.step()
        except KeyboardInterrupt:
            assert number in broken


@pytest.mark.parametrize("broken", [(1,), (2,), (3,), (2, 3), (1, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_what_raised_is_made_up_at_the_next_step(entry, broken):
    model, optimizer, session, batches = attached(entry)
    train(model, optimizer, batches, broken)
    assert session.sparsity == pytest.approx(0.5)
    assert session.step == 5
    session.close()


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_what_raised_to_the_end_is_made_up_when_closing_and_when_closing_again(entry):
    model, optimizer, session, batches = attached(entry)
    train(model, optimizer, batches, range(1, 6))
    with pytest.raises(KeyboardInterrupt):
        session.close()
    batches.broken = False
    session.close()
    assert session.sparsity == pytest.approx(0.5)
    session.close()
    assert [event["event"] for event in session.recorder.events].count("end") == 1


@pytest.mark.parametrize("fails", range(1, 8))
def test_nm_training_interrupted_while_choosing_ends_with_n_of_m(fails, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    entry = "nm_training: {pattern: '2:4', masking: sr_ste, window: {from: 1step, to: 3step}}"
    session = prunus.attach(model, optimizer, f"modifiers: [{{{entry}}}]")
    calls, choose = [0], NMLayerState.choose

    def interrupted(self, progress):
        calls[0] += 1
        if calls[0] == fails:
            raise KeyboardInterrupt
        return choose(self, progress)

    monkeypatch.setattr(NMLayerState, "choose", interrupted)
    for _ in range(5):
        model(torch.randn(4, 8)).square().mean().backward()
        try:
            optimizer.step()
        except KeyboardInterrupt:
            alive = [t.alive for t in session.runs[0].state]
            assert alive == [None, None]
        optimizer.zero_grad()
    session.close()
    for index in (0, 2):
        kept = (model[index].weight != 0).view(8, 2, 4).sum(2)
        assert bool((kept == 2).all())
