"""Patterns that tighten while training goes on, and what N:M training refuses."""

import pytest
import torch
from torch import nn

import prunus
from prunus.cli.preview import preview
from prunus.core.patterns import NM, NMAlongOutputs, parse_pattern
from prunus.modifiers.nm.stages import geometric, stages, stepwise

from tests.oracles.nm import Net

TABLE = {
    "1:8": (["7:8", "4:8", "2:8", "1:8"], ["8:64", "4:32", "2:16", "1:8"]),
    "2:4": (["3:4", "2:4"], ["16:32", "8:16", "4:8", "2:4"]),
    "3:8": (["7:8", "4:8", "3:8"], ["24:64", "12:32", "6:16", "3:8"]),
    "1:32": (
        ["31:32", "16:32", "8:32", "4:32", "2:32", "1:32"],
        ["8:256", "4:128", "2:64", "1:32"],
    ),
    "1:4": (["3:4", "2:4", "1:4"], ["8:32", "4:16", "2:8", "1:4"]),
    "3:4": (["3:4"], ["24:32", "12:16", "6:8", "3:4"]),
    "1:2": (["1:2"], ["8:16", "4:8", "2:4", "1:2"]),
}


@pytest.mark.parametrize("along", ["", " along outputs"])
@pytest.mark.parametrize("target", TABLE)
def test_named_structures_are_these(target, along):
    pattern = parse_pattern(target + along)
    for name, function, expected in zip(
        ("stepwise", "geometric"), (stepwise, geometric), TABLE[target], strict=True
    ):
        assert [str(p) for p in function(pattern)] == [p + along for p in expected]
        assert stages((name,), pattern) == function(pattern)


@pytest.mark.parametrize("m", range(2, 33))
def test_every_structure_ends_at_its_target_and_never_loosens(m):
    for n in range(1, m):
        for kind in (NM, NMAlongOutputs):
            target = kind(n, m)
            steps, halves = stepwise(target), geometric(target)
            assert steps[-1] == halves[-1] == target
            kept = [p.n for p in steps]
            assert kept == sorted(set(kept), reverse=True)
            assert {p.m for p in steps} == {m}
            assert all(p.n * m == p.m * n for p in halves)


def test_without_a_structure_there_is_the_target_alone_and_lists_are_kept():
    assert stages((), NM(1, 8)) == [NM(1, 8)]
    assert stages(("7:8", "2:4", "1:8"), NM(1, 8)) == [NM(7, 8), NM(2, 4), NM(1, 8)]
    outputs = stages(("3:4", "1:4"), NMAlongOutputs(1, 4))
    assert outputs == [NMAlongOutputs(3, 4), NMAlongOutputs(1, 4)]


def kept_in_turn(recipe, width, steps):
    """Weights that a layer of this many inputs has after each step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, width), nn.Linear(width, 1), nn.Linear(1, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    seen = []
    with prunus.attach(model, optimizer, recipe, steps_per_epoch=1, epochs=steps):
        for _ in range(steps):
            optimizer.step()
            seen.append(int((model[1].weight != 0).sum()))
    return seen


RECIPE = """
modifiers:
  - nm_training: {pattern: 1:8, structure: %s, masking: ste, layers: ["1"], window: {from: 20%%, to: 80%%}}
"""


@pytest.mark.parametrize(
    ("structure", "width", "expected"),
    [
        # of ten steps two are dense, six in the window and two frozen
        ("stepwise", 8, [8, 7, 7, 4, 2, 2, 1, 1, 1, 1]),
        ("[6:8, 3:8, 1:8]", 8, [8, 6, 6, 3, 3, 1, 1, 1, 1, 1]),
        ("[1:2, 1:8]", 8, [8, 4, 4, 4, 1, 1, 1, 1, 1, 1]),
        ("geometric", 64, [64, 8, 8, 8, 8, 8, 8, 8, 8, 8]),
    ],
)
def test_structures_share_the_window_in_equal_parts(structure, width, expected):
    assert kept_in_turn(RECIPE % structure, width, 10) == expected


def groups_of(width, steps=4):
    """The most weights that eight consecutive inputs have, after each step of a geometric run."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, width), nn.Linear(width, 16), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recipe = RECIPE.replace("20%%", "0%%").replace("80%%", "100%%") % "geometric"
    seen = []
    with prunus.attach(model, optimizer, recipe, steps_per_epoch=1, epochs=steps):
        for _ in range(steps):
            seen.append(int((model[1].weight != 0).reshape(-1, 8).sum(1).max()))
            optimizer.step()
    return seen


def test_groups_of_a_named_structure_that_do_not_divide_a_layer_are_left_out():
    assert len(set(groups_of(64))) >= 3  # 8:64, 4:32, 2:16, 1:8
    assert groups_of(64)[-1] == 1
    assert groups_of(24) == [1, 1, 1, 1]  # only 1:8 divides
    first, second, third, fourth = groups_of(16)
    assert first == second == 2  # 2:16 for the first half
    assert third == fourth == 1


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (64, [(0, "8:64"), (3, "4:32"), (6, "2:16"), (9, "1:8")]),
        (
            24,
            [
                (0, "8:64 in 1 of 2 layers"),
                (0, "1:8 in 1 of 2 layers"),
                (3, "4:32 in 1 of 2 layers"),
                (6, "2:16 in 1 of 2 layers"),
                (9, "1:8 in 1 of 2 layers"),
            ],
        ),
    ],
)
def test_the_plan_says_how_many_layers_get_a_pattern(width, expected):
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(width, 8))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recipe = RECIPE.replace("20%%", "0%%").replace("80%%", "100%%").replace('["1"]', '["*"]')
    session = prunus.attach(model, optimizer, recipe % "geometric", steps_per_epoch=12, epochs=1)
    *plan, last = session.runs[0].timetable()
    said = [(step, what.removeprefix("ste: train ")) for step, what in plan]
    assert said == expected
    assert last == (12, "ste: freeze the masks, 1:8")


def test_what_is_left_dense_is_shown():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    recipe = entry({"layers": None, "window": "{to: 9step}"})
    with prunus.attach(net, torch.optim.SGD(net.parameters(), 0.1), recipe) as session:
        (run,) = session.runs
        assert run.spared == {"2": "writes the output"}
        assert "left dense: 2 (writes the output)" in map(str, preview(run, "here"))


# what it refuses


def entry(more):
    base = {"pattern": "2:4", "masking": "ste", "layers": '["attn.proj"]'}
    text = {**base, **more}
    lines = [f"{key}: {value}" for key, value in text.items() if value is not None]
    return "modifiers:\n  - nm_training: {" + ", ".join(lines) + "}\n"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"pattern": "unstructured"}, "masking 'ste' trains N:M patterns, not 'unstruct"),
        ({"pattern": "4x1", "masking": "mdgf"}, "masking 'mdgf' trains N:M"),
        ({"pruner": "cap"}, "unknown key 'pruner'"),
        ({"sequential": "true"}, "unknown key 'sequential'"),
        ({"structure": "[7:8, 1:8]"}, "structure ends with 1:8, but the pattern is 2:4"),
        ({"structure": "stepwize"}, "'stepwize' is no N:M pattern; did you mean 'stepwise'"),
        ({"structure": "[8:8, 2:4]"}, "0 < N < M is needed"),
        ({"window": "{every: 1ep}"}, "window.every: unknown key 'every'"),
        ({"masking": "srste"}, "unknown masking 'srste'; did you mean 'sr_ste'"),
        ({"masking": "{name: mdgf, decay: cosin}"}, "did you mean 'cosine'"),
        ({"allocator": "global"}, "unknown key 'allocator'"),
        ({"sparsity": 0.75}, "unknown key 'sparsity'"),
    ],
)
def test_recipes_that_cannot_be_meant_are_refused_when_they_are_read(more, message):
    with pytest.raises(ValueError, match=message):
        prunus.Recipe.load(entry(more))


def attach_error(more, net=None, **lengths):
    net = Net() if net is None else net
    with pytest.raises(ValueError) as caught:
        prunus.attach(net, torch.optim.SGD(net.parameters(), 0.1), entry(more), **lengths)
    return str(caught.value)


def test_a_window_needs_an_end():
    assert "the window has no end; give it 'to', or give attach" in attach_error({})


def test_a_pattern_must_divide_the_layer():
    window = {"window": "{to: 9step}"}
    said = attach_error({"pattern": "1:16", **window})
    assert "attn.proj: pattern 1:16 does not divide 8 input channels; use 1:2 or 1:4" in said
    said = attach_error({"pattern": "1:16 along outputs", **window})
    assert "pattern 1:16 along outputs does not divide 8 outputs" in said
    said = attach_error({"pattern": "1:8", "structure": "[4:32, 1:8]", **window})
    assert "attn.proj: pattern 4:32 does not divide 8 input channels" in said


def test_the_model_is_untouched_by_a_recipe_that_is_refused():
    net = Net()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    good = entry({"window": "{to: 9step}"})
    bad = entry({"pattern": "1:16", "window": "{to: 9step}"}).replace("modifiers:\n", "")
    with pytest.raises(ValueError, match="does not divide"):
        prunus.attach(net, torch.optim.SGD(net.parameters(), 0.1), good + bad)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert not any(module._forward_pre_hooks for module in net.modules())
