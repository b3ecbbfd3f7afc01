"""Layers that a pattern does not divide, or whose inputs cannot be measured, may be left dense."""

import logging

import pytest
import torch
from torch import nn

import prunus
from prunus.allocators import OWL
from prunus.report.summary import Summary

from tests.helpers.training import same, snapshot


class Odd(nn.Module):
    """A depthwise convolution, and one of six channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8)
        self.to_six, self.from_six = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.from_six(self.to_six(self.depthwise(self.stem(x)).relu()))
        return self.head(x.mean((2, 3)))


def images():
    return prunus.Calibration([torch.randn(2, 3, 8, 8)])


INSIDE = ["depthwise", "to_six", "from_six"]
CASES = {
    "2:4": ("magnitude", {"pattern": "2:4"}, ["depthwise", "from_six"]),
    "2:4 along outputs": ("magnitude", {"pattern": "2:4 along outputs"}, ["to_six"]),
    "blocks": ("magnitude", {"pattern": "4x1", "sparsity": 0.5}, ["to_six"]),
    "inputs": (prunus.Wanda(), {"sparsity": 0.5, "layers": INSIDE}, ["depthwise"]),
    "inputs 2:4": (
        prunus.SparseGPT(),
        {"pattern": "2:4", "layers": INSIDE},
        ["depthwise", "from_six"],
    ),
    "signals": (
        "magnitude",
        {"sparsity": 0.5, "allocator": OWL(), "layers": INSIDE},
        ["depthwise"],
    ),
    "groups in blocks of a Fisher": (
        prunus.OBS(block_size=6, num_grads=4, damp=1e-4),
        {"pattern": "2:4"},
        ["depthwise", "to_six", "from_six"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_refused_or_left_dense_by_name(case):
    pruner, arguments, misfits = CASES[case]
    model = Odd()
    before = snapshot(model)
    with pytest.raises(ValueError, match=misfits[0]) as error:
        prunus.prune(model, pruner, calibration=images(), **arguments)
    assert all(name in str(error.value) for name in misfits)
    assert same(model, before)
    if len(misfits) == len(INSIDE):  # nothing is left to prune
        with pytest.raises(ValueError, match=misfits[0]):
            prunus.prune(model, pruner, calibration=images(), misfits="dense", **arguments)
        return
    assert "misfits: dense" in str(error.value)
    result = prunus.prune(model, pruner, calibration=images(), misfits="dense", **arguments)
    assert list(result.misfits) == misfits
    assert [row.name for row in result.rows] == [x for x in INSIDE if x not in misfits]
    for name in misfits:
        weight = f"{name}.weight"
        assert torch.equal(model.state_dict()[weight], before[weight])
    assert result.sparsity == 0.5
    alone = Odd()
    alone.load_state_dict(before)
    if pruner == "magnitude" and "allocator" not in arguments:
        prunus.prune(alone, pruner, exclude=misfits, **arguments)
        assert same(model, alone)


def test_what_was_left_out_is_told_in_result_log_and_report(caplog, tmp_path):
    with caplog.at_level(logging.INFO, "prunus"):
        result = prunus.prune(Odd(), "magnitude", pattern="2:4", misfits="dense")
    reason = "pattern 2:4 does not divide 1 input channels"
    assert f"do not fit, left dense: depthwise, from_six ({reason})" in str(result)
    assert f"do not fit, left dense: depthwise, from_six ({reason})" in caplog.text
    result.report(tmp_path)
    assert f"these do not fit: depthwise ({reason})" in (tmp_path / "report.html").read_text()


def test_sweeps_and_recipes_take_the_option():
    how = {"layers": INSIDE, "calibration": images(), "misfits": "dense"}
    result = prunus.sweep(Odd(), "wanda", [0.5], float_of, **how)
    assert list(result.misfits) == ["depthwise"]
    assert "do not fit, left dense: depthwise" in str(result)
    recipe = prunus.Recipe.load("modifiers: [{prune: {pattern: '2:4', misfits: dense}}]")
    assert prunus.Recipe.load(recipe.to_yaml()) == recipe
    assert list(prunus.prune(Odd(), recipe).misfits) == ["depthwise", "from_six"]


def test_a_table_may_name_what_is_left_dense():
    table = {"depthwise": 0.5, "to_six": 0.5, "from_six": 0.25}
    what = {"allocator": table, "pattern": "4x1", "misfits": "dense"}
    result = prunus.prune(Odd(), "magnitude", **what)
    assert [row.sparsity for row in result.rows] == [0.5, 0.25]
    wrong = {**what, "allocator": {"to_sixx": 0.5, "*": 0.5}}
    for call in (
        lambda: prunus.prune(Odd(), "magnitude", **wrong),
        lambda: prunus.sweep(Odd(), "magnitude", [0.5], float_of, **wrong),
    ):
        with pytest.raises(
            ValueError, match="'to_sixx' matches no pruned layer; did you mean 'to_"
        ):
            call()


def float_of(model):
    return float(prunus.sparsity(model))


ENTRIES = {
    "prune": ("{prune: {pattern: '2:4', misfits: dense}}", ["depthwise", "from_six"]),
    "nm_training": ("{nm_training: {pattern: '2:4', misfits: dense}}", ["depthwise", "from_six"]),
    "stages": (
        "{nm_training: {pattern: '2:4', structure: ['7:8', '2:4'], layers: [to_six, from_six], "
        "misfits: dense}}",
        ["from_six"],
    ),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_entries_of_training_leave_misfits_to_the_optimizer(entry):
    text, misfits = ENTRIES[entry]
    model = Odd()
    before = snapshot(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with prunus.attach(
        model, optimizer, f"modifiers: [{text}]", steps_per_epoch=2, epochs=1
    ) as session:
        for _ in range(2):
            model(torch.randn(2, 3, 8, 8)).square().mean().backward()
            optimizer.step()
    assert list(session.masks) == ["to_six.weight"]
    for name in misfits:
        assert model.get_submodule(name).weight.count_nonzero() == before[f"{name}.weight"].numel()
    assert list(session.runs[0].misfits) == misfits
    assert len(Summary(session.recorder.events).misfits) == len(misfits)
    with pytest.raises(ValueError, match=misfits[0]):
        prunus.attach(
            model, optimizer, f"modifiers: [{text}]".replace(", misfits: dense", ""),
            steps_per_epoch=2, epochs=1,
        )  # fmt: skip
