import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import prunus
from prunus.allocators import ERK, Global, Problem, Table, Uniform, Unit
from prunus.allocators.base import fill

from tests.oracles.nm import Net
from tests.oracles.pruning import small_cnn, small_mlp


@st.composite
def problems(draw):
    units = []
    for i in range(draw(st.integers(1, 5))):
        out, inputs = draw(st.integers(1, 20)), draw(st.integers(1, 20))
        pruned = draw(st.integers(0, out * inputs))
        units.append(Unit(f"layer{i}", (out, inputs), out * inputs, pruned))
    return units


@given(problems(), st.floats(0, 1), st.sampled_from([ERK(), Table({"*": 0.5})]))
@settings(deadline=None)
def test_the_target_is_met_exactly_and_zeros_stay(units, target, allocator):
    problem = Problem(units, target, lambda k: [])
    drop = allocator.allocate(problem).drop
    assert sum(drop) == problem.drop == max(round(target * problem.size), problem.pruned)
    assert all(u.pruned <= d <= u.size for u, d in zip(units, drop, strict=True))


@given(
    st.lists(
        st.tuples(st.floats(0.01, 10), st.integers(0, 20), st.integers(0, 20)),
        min_size=1,
        max_size=6,
    ),
    st.data(),
)
@settings(deadline=None)
def test_fill_is_proportional_between_its_bounds(rows, data):
    shares = [row[0] for row in rows]
    low = [row[1] for row in rows]
    high = [row[1] + row[2] for row in rows]
    total = data.draw(st.integers(sum(low), sum(high)))
    whole = fill(shares, low, high, total)
    assert sum(whole) == total
    free = [w / s for w, s, a, b in zip(whole, shares, low, high, strict=True) if a + 1 < w < b - 1]
    if len(free) > 1:  # where no bound holds, within one unit of proportional
        slack = 2 / min(shares)
        assert max(free) - min(free) <= slack + 1e-6


@pytest.mark.parametrize(
    ("shares", "low", "high", "total", "expected"),
    [
        ((1, 1, 1), (0, 0, 0), (9, 9, 9), 5, [2, 2, 1]),
        ((1, 1, 1, 1), (0, 0, 0, 0), (9, 9, 9, 9), 9, [3, 2, 2, 2]),
        ((1, 3), (0, 0), (9, 9), 2, [1, 1]),
        ((2, 1, 1), (0, 0, 0), (9, 9, 9), 2, [1, 1, 0]),
        ((1, 1, 1), (0, 0, 0), (1, 9, 9), 6, [1, 3, 2]),
        ((1, 1, 1), (0, 4, 0), (9, 9, 9), 7, [2, 4, 1]),
    ],
)
def test_of_equal_remainders_the_first_get_the_rest(shares, low, high, total, expected):
    assert fill(shares, low, high, total) == expected


@given(problems(), st.floats(0, 1))
@settings(deadline=None)
def test_uniform_is_within_one_unit_in_each_layer_and_zeros_stay(units, target):
    problem = Problem(units, target, lambda k: [])
    drop = Uniform().allocate(problem).drop
    wanted = [max(target * u.size, u.pruned) for u in units]
    assert all(abs(d - w) <= 1 for d, w in zip(drop, wanted, strict=True))
    assert all(u.pruned <= d <= u.size for u, d in zip(units, drop, strict=True))
    assert abs(sum(drop) - sum(wanted)) <= 0.5 + 1e-6
    if not any(u.pruned > target * u.size for u in units):
        assert sum(drop) == problem.drop


def test_uniform_does_not_make_up_for_a_layer_that_is_sparser():
    model = small_mlp()
    prunus.prune(model, "magnitude", sparsity=0.9, layers=["0"])
    result = prunus.prune(model, "magnitude", sparsity=0.6, allocator="uniform", layers=["0", "2"])
    assert {r.name: r.sparsity for r in result.rows} == pytest.approx(
        {"0": 0.9, "2": 0.6}, abs=2e-3
    )


def test_erk_keeps_small_layers_denser_in_the_published_proportion():
    units = [
        Unit("a", (100, 100), 10_000, 0),
        Unit("b", (100, 50, 3, 3), 45_000, 0),
        Unit("c", (10, 10), 100, 0),
    ]
    allocation = ERK().allocate(Problem(units, 0.9, lambda k: []))
    density = {name: 1 - s for name, s in allocation.sparsity.items()}
    raw = {u.name: sum(u.shape) / torch.Size(u.shape).numel() for u in units}
    assert density["c"] > density["a"] > density["b"]
    ratio = (density["a"] / density["b"]) / (raw["a"] / raw["b"])
    assert ratio == pytest.approx(1, abs=1e-3)


def test_erk_keeps_dense_what_would_be_more_than_dense():
    units = [Unit("small", (2, 2), 4, 0), Unit("large", (100, 100), 10_000, 0)]
    allocation = ERK().allocate(Problem(units, 0.5, lambda k: []))
    assert allocation.sparsity["small"] == 0


def test_global_ranks_all_layers_together():
    model = small_mlp()
    with torch.no_grad():
        model[0].weight.mul_(100)
    result = prunus.prune(model, "magnitude", sparsity=0.5, allocator=Global())
    rates = {row.name: row.sparsity for row in result.rows}
    assert rates["0"] < 0.1
    assert rates["2"] > 0.7


@pytest.mark.parametrize("allocator", ["uniform", "erk"])
def test_layerwise_allocators_prune_the_model_to_the_target(allocator):
    result = prunus.prune(small_cnn(), "magnitude", sparsity=0.8, allocator=allocator)
    assert result.sparsity == pytest.approx(0.8, abs=1e-3)


def test_a_table_sets_each_layer():
    result = prunus.prune(small_mlp(), "magnitude", allocator={"0": 0.25, "*": 0.75})
    assert {row.name: row.sparsity for row in result.rows} == {"0": 0.25, "2": 0.75}


@pytest.mark.parametrize(
    "table", [{"attn.qkv[q]": 0.25, "*[k]": 0.75}, {"attn.qkv[[]q]": 0.25, "*.qkv[k]": 0.75}]
)
def test_a_table_names_thirds(table):
    layers = ["attn.qkv[q]", "attn.qkv[k]"]
    result = prunus.prune(Net(), "magnitude", layers=layers, allocator=table)
    assert [row.sparsity for row in result.rows] == [0.25, 0.75]
    with pytest.raises(ValueError, match=r"'attn.qkv\[v\]' matches no pruned layer"):
        prunus.prune(Net(), "magnitude", layers=layers, allocator={**table, "attn.qkv[v]": 0.5})


def test_a_class_of_characters_in_a_table_stays_one():
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in "qkx"})
    table = {"[k]": 0.5, "*": 0.25}
    result = prunus.prune(model, "magnitude", layers=list("qkx"), allocator=table)
    assert [row.sparsity for row in result.rows] == [0.25, 0.5, 0.25]


def test_a_table_scales_to_an_overall_target():
    result = prunus.prune(small_mlp(), "magnitude", allocator={"0": 0.2, "2": 0.4}, sparsity=0.5)
    rates = {row.name: row.sparsity for row in result.rows}
    assert result.sparsity == pytest.approx(0.5, abs=1e-3)
    assert rates["2"] == pytest.approx(2 * rates["0"], abs=0.01)


def test_an_allocation_saves_to_a_file_that_the_table_reads(tmp_path):
    units = [Unit("0", (32, 8), 256, 0), Unit("2", (16, 32), 512, 0)]
    ERK().allocate(Problem(units, 0.5, lambda k: [])).save(tmp_path / "erk.json")
    saved = json.loads((tmp_path / "erk.json").read_text())
    table = Table(file=str(tmp_path / "erk.json"))
    result = prunus.prune(small_mlp(), "magnitude", allocator=table)
    assert {row.name: row.sparsity for row in result.rows} == pytest.approx(saved)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"0": 0.5}, "no entry for '2'"),
        ({"0": 0.5, "2": 0.5, "7": 0.1}, "'7' matches no pruned layer"),
        ({"0": 1.5}, "is not between 0 and 1"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(table, message):
    model = small_mlp()
    with pytest.raises(ValueError, match=message):
        prunus.prune(model, "magnitude", allocator=table)
    assert float(prunus.sparsity(model)) == 0


def test_layers_sparser_than_their_share_spare_the_others():
    model = small_mlp()
    prunus.prune(model, "magnitude", sparsity=0.9, layers=["0"])
    result = prunus.prune(model, "magnitude", sparsity=0.5, allocator="erk", layers=["0", "2"])
    assert result.sparsity == pytest.approx(0.5, abs=1e-3)
    assert result.rows[0].sparsity == pytest.approx(0.9, abs=5e-3)
