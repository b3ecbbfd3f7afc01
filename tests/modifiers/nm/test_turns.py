"""Entries that mask the same weights one after the other, N:M training among them."""

import copy
import itertools
import logging

import pytest
import torch
from torch import nn

import prunus

from tests.oracles.nm import Net, nm_keep

PRUNED = "prune: {layers: [attn.proj], sparsity: 0.7, window: {from: 2step}}"
KEPT = "semi_sparse: {layers: [attn.proj], keep: true, window: {to: 6step}}"
FIRST = "nm_training: {layers: [attn.proj], pattern: '2:4', masking: ste, window: {to: 6step}}"
SECOND = "nm_training: {layers: [attn.proj], pattern: '%s', masking: %s, window: {from: 6step, to: 12step}}"
WHOLE = {
    "2:4": "nm_training: {layers: [attn.qkv], pattern: '2:4', masking: ste, window: {to: 6step}}",
    "half": "prune: {layers: [attn.qkv], sparsity: 0.5, window: {from: 2step}}",
    "kept": "semi_sparse: {layers: [attn.qkv], keep: true, window: {to: 6step}}",
}
THIRD = (
    "nm_training: {layers: ['attn.qkv[q]'], pattern: '1:4', masking: sr_ste, "
    "window: {from: 6step, to: 12step}}"
)


class Training:
    def __init__(self, *entries):
        torch.manual_seed(0)
        self.net = Net().double()
        self.optimizer = torch.optim.AdamW(self.net.parameters(), 1e-2)
        self.session = prunus.attach(self.net, self.optimizer, f"modifiers: [{', '.join(entries)}]")
        self.batches = torch.randn(20, 3, 4, 5, generator=torch.Generator().manual_seed(1)).double()

    def to(self, last):
        for x in self.batches[self.session.step : last]:
            self.optimizer.zero_grad()
            self.net(x).square().mean().backward()
            self.optimizer.step()
        return self

    def same_as(self, other):
        theirs = other.net.state_dict()
        return all(torch.equal(t, theirs[name]) for name, t in self.net.state_dict().items())

    @property
    def parts(self):
        return self.net, self.optimizer, self.session


def groups(w):
    return (w != 0).reshape(-1, 4).sum(1)


@pytest.mark.parametrize("masking", ["ste", "mdgf"])
@pytest.mark.parametrize("first", [PRUNED, KEPT, FIRST])
def test_weights_pruned_before_n_m_training_stay_pruned(first, masking):
    it = Training(first, SECOND % ("2:4", masking)).to(5)
    if first is PRUNED:
        before = it.net.attn.proj.weight != 0
    it.to(6)
    if first is not PRUNED:
        before = it.session.masks["attn.proj.weight"].clone()
    for last in range(6, 14):
        weight = it.to(last).net.attn.proj.weight
        assert not weight[~before].any()
    alive = nm_keep(torch.where(before, 1.0, 0.0), 2, 4) & before
    assert torch.equal(groups(weight), groups(alive))


def test_the_highest_of_the_weights_that_are_left_are_kept():
    it = Training(PRUNED, SECOND % ("1:4", "ste")).to(6)
    dense = it.session.state_dict()["runs"][1]["dense"]["attn.proj"]
    assert torch.equal(dense == 0, it.session.runs[1].state.layers[0].alive.logical_not())
    assert torch.equal(it.net.attn.proj.weight != 0, nm_keep(dense.abs(), 1, 4) & (dense != 0))


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("first", [PRUNED, KEPT, FIRST])
@pytest.mark.parametrize("at", [3, 6, 7])
def test_a_run_that_passes_from_entry_to_entry_resumes_bit_for_bit(first, order, at, caplog):
    entries = (first, SECOND % ("1:4", "sr_ste"))[::order]
    with caplog.at_level(logging.WARNING, "prunus"):
        whole = Training(*entries).to(15)
        states = [part.state_dict() for part in Training(*entries).to(at).parts]
        again = Training(*entries)
        for part, state in zip(again.parts, states, strict=True):
            part.load_state_dict(state)
        assert again.to(15).same_as(whole)
        assert whole.same_as(Training(*entries[::-1]).to(15))
    assert not caplog.records


@pytest.mark.parametrize("at", range(0, 14, 3))
def test_a_session_goes_back_to_before_other_entries_had_begun(at):
    entries = PRUNED, SECOND % ("1:4", "mdgf")
    whole, it = Training(*entries).to(15), Training(*entries).to(at)
    states = copy.deepcopy([part.state_dict() for part in it.parts])
    it.to(15)
    for part, state in zip(it.parts, states, strict=True):
        part.load_state_dict(state)
    assert it.to(15).same_as(whole)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("first", WHOLE)
def test_a_third_in_n_m_training_keeps_its_dense_weight_while_others_hold_the_rest(first, order):
    it = Training(*(WHOLE[first], THIRD)[::order]).to(6)
    mask = it.session.masks["attn.qkv.weight"].clone()
    run = it.session.runs[1 if order > 0 else 0]
    for last in range(7, 15):
        it.to(last)
        weight = it.net.attn.qkv.weight
        assert not weight[8:][~mask[8:]].any()
        if last < 12:
            dense = run.state_dict()["dense"]["attn.qkv[q]"]
            alive = run.state.layers[0].alive
            assert torch.equal(dense != 0, alive)
            assert int(alive.count_nonzero()) > 16  # more than the mask lets through
    assert (groups(weight[:8]) <= 1).all()
    assert weight[8:][mask[8:]].all()


def test_ownership_of_thirds_survives_a_resume():
    whole = Training(WHOLE["half"], THIRD).to(15)
    states = [part.state_dict() for part in Training(WHOLE["half"], THIRD).to(8).parts]
    again = Training(WHOLE["half"], THIRD)
    for part, state in zip(again.parts, states, strict=True):
        part.load_state_dict(state)
    assert again.to(15).same_as(whole)


ACCELERATE = "semi_sparse: {layers: [attn.proj], window: {from: %s, to: %s}}"


@pytest.mark.parametrize(
    "other",
    [
        SECOND % ("1:4", "ste"),
        ACCELERATE % ("9step", "20step"),
        "semi_sparse: {layers: [attn.proj]}",
    ],
)
def test_accelerated_layers_are_not_trained_to_n_m_or_accelerated_twice_at_a_time(other):
    for entries in itertools.permutations([ACCELERATE % ("0step", "10step"), other]):
        with pytest.raises(ValueError, match="two entries mask attn.proj at the same time"):
            Training(*entries)
    for entries in itertools.permutations(
        [ACCELERATE % ("0step", "6step"), SECOND % ("1:4", "ste")]
    ):
        Training(*entries).session.close(finish=False)


@pytest.mark.parametrize("order", [1, -1])
def test_masks_kept_after_acceleration_prune_no_less_than_before(order):
    it = Training(*(PRUNED, KEPT)[::order]).to(5)
    assert type(it.net.attn.proj) is not nn.Linear
    pruned = it.net.attn.proj.weight == 0
    assert int(pruned.sum()) == round(0.7 * 64)
    weight = it.to(9).net.attn.proj.weight
    assert not weight[pruned].any()
    assert (groups(weight) <= 2).all()
    assert (groups(weight.T) <= 2).all()
    assert torch.equal(it.session.masks["attn.proj.weight"], weight != 0)


def test_pruning_at_the_first_step_and_n_m_training_from_it_are_the_same_time():
    early = "prune: {layers: [attn.proj], sparsity: 0.7}"
    trained = (
        "nm_training: {layers: [attn.proj], pattern: '2:4', masking: ste, window: {to: 6step}}"
    )
    with pytest.raises(ValueError, match="two entries mask attn.proj at the same time"):
        Training(early, trained)
