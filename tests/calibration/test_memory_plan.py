"""The plan: what is held at a time, and that results do not depend on it."""

import copy
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import prunus
from prunus.calibration.measurements import measurements
from prunus.calibration.memory_plan import Need, parse_bytes, plan
from prunus.core.layers import all_layers
from prunus.stats import BlockFisher

from tests.oracles.pruning import small_cnn, small_mlp

mse = nn.functional.mse_loss
LAYERS = list(all_layers(nn.Sequential(*[nn.Linear(2, 2) for _ in range(4)])))
FISHER = {"block_size": 8, "damp": 1e-4}


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 << 30), ("500MB", 500_000_000), ("1.5 kib", 1536), (4096, 4096), ("12", 12)],
)
def test_sizes_read_as_people_write_them(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["8 bananas", "GiB", "-3", "0", ""])
def test_what_is_no_size_says_how_to_write_one(text):
    with pytest.raises(ValueError, match="is no size; write '8GiB'"):
        prunus.Calibration([], memory=text)


NEEDS = st.lists(
    st.tuples(st.integers(1, 20), st.integers(1, 50), st.booleans()), min_size=1, max_size=4
)


@given(NEEDS, st.integers(50, 400))
def test_a_plan_holds_every_row_once_in_order_and_never_more_than_the_budget(raw, budget):
    needs = [
        Need(layer, rows, size, 0) if split else Need(layer, rows, 0, size)
        for layer, (rows, size, split) in zip(LAYERS, raw, strict=False)
    ]
    groups = plan(needs, budget)
    by_layer = {need.layer: need for need in needs}
    for group in groups:
        used = sum(
            len(part) * by_layer[part.layer].row_bytes + by_layer[part.layer].whole_bytes
            for part in group
        )
        assert group
        assert used <= budget
    for need in needs:
        parts = [part for group in groups for part in group if part.layer is need.layer]
        assert [row for part in parts for row in range(part.begin, part.end)] == list(
            range(need.rows)
        )
        assert need.row_bytes or len(parts) == 1


@given(NEEDS)
def test_without_a_budget_there_is_one_group(raw):
    needs = [Need(layer, rows, size) for layer, (rows, size, _) in zip(LAYERS, raw, strict=False)]
    assert len(plan(needs, None)) == 1


def test_a_row_that_does_not_fit_is_refused_with_the_remedy():
    data = prunus.Calibration([(torch.randn(4, 8), torch.randn(4, 4))], mse, memory=500)
    model = small_mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="2: memory .* 500 bytes, and a single row takes .* raise"):
        prunus.prune(model, prunus.CAP(), sparsity=0.5, layers=["2"], calibration=data)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("pruner", "arguments"),
    [
        (prunus.OBS(**FISHER), {"sparsity": 0.6}),
        (prunus.OBS(**FISHER), {"sparsity": 0.5, "pattern": "4x1"}),
        (prunus.CAP(**FISHER), {"sparsity": 0.7}),
        (prunus.CAP(num_grads=3, **FISHER), {"sparsity": 0.7}),
        (prunus.CAP(samples="example", **FISHER), {"sparsity": 0.7}),
        (prunus.CAP(**FISHER), {"pattern": "2:4"}),
        (prunus.CAP(num_recomputations=3, **FISHER), {"sparsity": 0.7}),
        (prunus.FastCAP(), {"sparsity": 0.6}),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_fisher_of_ten_times_the_budget_prunes_the_same(pruner, arguments):
    model = small_cnn(torch.float64)
    batches = [
        (torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64))
        for _ in range(9)
    ]
    layers = [layer for layer in all_layers(model) if layer.name in ("2", "5", "8")]
    whole = sum(pruner.statistic(layer).nbytes for layer in layers)
    largest = max(
        pruner.statistic(layer).nbytes if pruner.name == "fastcap" else 0 for layer in layers
    )
    budget = max(whole // 10, largest)
    results = []
    for memory in (None, budget):
        pruned = copy.deepcopy(model)
        data = prunus.Calibration(batches, mse, memory=memory)
        prunus.prune(
            pruned, pruner, layers=[layer.name for layer in layers], calibration=data, **arguments
        )
        results.append(pruned.state_dict())
    groups = measurements(
        pruner.statistic, layers, model, prunus.Calibration(batches, mse, memory=budget)
    ).groups
    assert len(groups) >= (2 if pruner.name == "fastcap" else 10)
    for name, t in results[0].items():
        assert torch.equal(results[1][name] == 0, t == 0)
        torch.testing.assert_close(results[1][name], t, rtol=1e-9, atol=1e-12)


def test_a_sweep_over_the_budget_is_the_sweep_within_it():
    model = small_mlp()
    batches = [(torch.randn(4, 8), torch.randn(4, 4)) for _ in range(9)]

    def sweep(memory):
        data = prunus.Calibration(batches, mse, memory=memory)
        evaluate = lambda m: m(batches[0][0]).sum().item()  # noqa: E731
        pruner = prunus.CAP(**FISHER)
        values = prunus.sweep(model, pruner, [0.5, 0.8], evaluate, calibration=data).values
        return [metrics["value"] for metrics in values.values()]

    assert sweep(None) == pytest.approx(sweep(5000))


def test_what_a_group_holds_is_what_was_planned():
    model = small_mlp()
    data = prunus.Calibration([(torch.randn(4, 8), torch.randn(4, 4))] * 99, mse, memory=6000)
    layers = [layer for layer in all_layers(model) if layer.name in ("0", "2")]
    planned = measurements(prunus.CAP(**FISHER).statistic, layers, model, data)
    for i in range(len(planned.groups)):
        held = sum(t.nbytes for stat in planned[i].values() for t in stat.tensors())
        waiting = sum(
            t.nbytes for stat in planned[i].values() for t in getattr(stat, "_waiting", [])
        )
        assert held + waiting <= planned.bytes_of(planned.groups[i]) <= 6000


def test_two_groups_are_never_held_at_a_time(monkeypatch):
    model, live, stats = small_mlp(), [], weakref.WeakSet()
    init = BlockFisher.__init__

    def known(self, *args, **kwargs):
        init(self, *args, **kwargs)
        stats.add(self)

    monkeypatch.setattr(BlockFisher, "__init__", known)
    batches = [(torch.randn(4, 8), torch.randn(4, 4)) for _ in range(5)]

    def loss(output, y):
        live.append(sum(t.nbytes for stat in stats for t in stat.tensors()))
        return mse(output, y)

    data = prunus.Calibration(batches, loss, memory=6000)
    prunus.prune(model, prunus.CAP(**FISHER), sparsity=0.5, calibration=data)
    assert 0 < max(live) <= 6000
