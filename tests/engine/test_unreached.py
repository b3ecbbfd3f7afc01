"""Layers about which the data tells nothing are refused, pruned by magnitude or left dense."""

import logging

import pytest
import torch
from torch import nn

import prunus
from prunus.modifiers import MODIFIERS
from prunus.report.summary import Summary

from tests.helpers.training import same, snapshot

HALF = {"sparsity": 0.5}


class Routed(nn.Module):
    """Experts: one gets all tokens, one is called with none, one is never called."""

    def __init__(self, d=8):
        super().__init__()
        self.first, self.hot = nn.Linear(d, d), nn.Linear(d, d)
        self.cold, self.never = nn.Linear(d, d), nn.Linear(d, d)
        self.head = nn.Linear(d, 2)

    def mixed(self, x):
        h = self.first(x)
        chosen = torch.zeros(len(h), dtype=torch.bool)
        y = torch.zeros_like(h)
        y[~chosen], y[chosen] = self.hot(h[~chosen]), self.cold(h[chosen])
        return y

    def forward(self, x):
        return self.head(self.mixed(x).relu())


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Block(Routed):
    def forward(self, x):
        return x + self.mixed(x)


def inputs():
    return prunus.Calibration([torch.randn(16, 8) for _ in range(2)])


def pairs(memory=None):
    batches = [(torch.randn(4, 8), torch.randn(4, 2)) for _ in range(12)]
    return prunus.Calibration(batches, nn.functional.mse_loss, memory=memory)


FISHER = {"block_size": 4, "num_grads": 12, "damp": 1e-4}
METHODS = {
    "wanda": (prunus.Wanda(), HALF, inputs),
    "ria row": (prunus.RIA(), {"sparsity": 0.5, "pattern": "row"}, inputs),
    "wanda 2:4": (prunus.Wanda(), {"pattern": "2:4"}, inputs),
    "wanda blocks": (prunus.Wanda(), {"sparsity": 0.5, "pattern": "4x1"}, inputs),
    "sparsegpt": (prunus.SparseGPT(), HALF, inputs),
    "sparsegpt 2:4": (prunus.SparseGPT(), {"pattern": "2:4"}, inputs),
    "alps erk": (prunus.ALPS(iterations=5), {**HALF, "allocator": "erk"}, inputs),
    "obs": (prunus.OBS(**FISHER), HALF, pairs),
    "cap stages": (prunus.CAP(**FISHER, num_recomputations=2), HALF, pairs),
    "cap groups": (prunus.CAP(**FISHER), HALF, lambda: pairs(memory=2000)),
    "fastcap": (prunus.FastCAP(block_size=4, num_grads=12), HALF, pairs),
    "fastcap groups": (
        prunus.FastCAP(block_size=8, num_grads=12),
        HALF,
        lambda: pairs(memory=300),
    ),
}
methods = pytest.mark.parametrize("method", METHODS)
EXPERTS = ["first", "hot", "cold", "never"]


def pruned(method, unreached, layers=EXPERTS, build=Routed):
    pruner, arguments, data = METHODS[method]
    torch.manual_seed(1)
    model = build()
    before = snapshot(model)
    torch.manual_seed(2)
    what = {**arguments, "layers": layers, "calibration": data()}
    return model, before, lambda: prunus.prune(model, pruner, unreached=unreached, **what)


@methods
def test_layers_without_data_are_refused_with_the_remedy(method):
    model, before, run = pruned(method, "error")
    with pytest.raises(ValueError, match=r"(reached|depends on) .*; nothing was pruned: .*") as e:
        run()
    assert "cold" in str(e.value) or "memory" in str(METHODS[method])
    assert "unreached: magnitude or unreached: dense" in str(e.value)
    assert same(model, before)


@methods
def test_left_dense_they_stay_as_they_are_and_the_others_as_if_alone(method):
    model, before, run = pruned(method, "dense")
    result = run()
    assert result.unreached == {"cold": "dense", "never": "dense"}
    for name in ("cold", "never"):
        assert torch.equal(model.get_submodule(name).weight, before[f"{name}.weight"])
    alone, _, run = pruned(method, "error", layers=["first", "hot"])
    whole = run()
    assert same(model, alone)
    zeros = {row.name: row.zeros for row in result.rows}
    assert [zeros[name] for name in EXPERTS] == [*(row.zeros for row in whole.rows), 0, 0]
    assert result.sparsity == sum(zeros.values()) / 256


@methods
def test_by_magnitude_they_lose_their_smallest_weights(method):
    model, before, run = pruned(method, "magnitude")
    result = run()
    assert result.unreached == {"cold": "magnitude", "never": "magnitude"}
    pattern = METHODS[method][1].get("pattern", "unstructured")
    for row in (row for row in result.rows if row.unreached):
        whole = nn.Sequential(nn.Linear(8, 8, bias=False))
        whole[0].weight.data = before[f"{row.name}.weight"].clone()
        share = {} if ":" in pattern else {"sparsity": row.zeros / 64}
        prunus.prune(whole, "magnitude", pattern=pattern, layers="0", **share)
        assert torch.equal(model.get_submodule(row.name).weight, whole[0].weight)
        assert row.error is None
    assert result.sparsity == pytest.approx(0.5)


def test_where_scores_are_ranked_together_each_meets_the_target_by_itself():
    model, _, run = pruned("obs", "magnitude")
    rows = {row.name: row.zeros for row in run().rows}
    assert rows["cold"] == rows["never"] == 32
    alone, _, run = pruned("obs", "error", layers=["first", "hot"])
    run()
    for name in ("first", "hot"):
        ours, theirs = model.get_submodule(name), alone.get_submodule(name)
        assert torch.equal(ours.weight, theirs.weight)


class Gated(nn.Module):
    """A branch that counts for nothing yet, as residual branches that begin at zero."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.a(x) + 0 * self.b(x))


@pytest.mark.parametrize(
    "pruner", [prunus.OBS(**FISHER), prunus.FastCAP(block_size=4, num_grads=4)]
)
def test_a_branch_whose_gradients_are_zeros_is_pruned_by_magnitude_and_named(pruner, caplog):
    """Its scores would be the lowest of all, and empty it."""
    for unreached in ("error", "magnitude", "dense"):
        model = Gated()
        dense = model.b.weight.detach().clone()
        result = prunus.prune(model, pruner, sparsity=0.5, calibration=pairs(), unreached=unreached)
        done = "dense" if unreached == "dense" else "magnitude"
        assert result.unreached == {"b": done}
        if done == "magnitude":
            kept = dense.abs() > dense.abs().flatten().sort().values[31]
            assert torch.equal(model.b.weight != 0, kept)
    assert "because no calibration data tells of them: b" in caplog.text
    prunus.fisher(Gated(), pairs(), settings=prunus.OBS(**FISHER))  # has damp on its diagonal


@pytest.mark.parametrize("unreached", ["magnitude", "dense"])
def test_block_by_block_as_all_at_once(unreached):
    for sequential in (False, True):
        torch.manual_seed(1)
        model = Blocks()
        data = prunus.Calibration([torch.randn(16, 8, generator=torch.Generator().manual_seed(3))])
        result = prunus.prune(
            model, "wanda", pattern="2:4", calibration=data, sequential=sequential,
            unreached=unreached, layers=["blocks.*"], exclude=["*.head"],
        )  # fmt: skip
        kinds = {f"blocks.{i}.{name}": unreached for i in (0, 1) for name in ("cold", "never")}
        assert result.unreached == kinds
    with pytest.raises(ValueError, match=r"reached blocks.0.cold, blocks.0.never; nothing"):
        prunus.prune(
            model, "wanda", pattern="2:4", calibration=data, sequential=True, exclude=["*head"]
        )


@pytest.mark.parametrize("sequential", [False, True])
def test_an_allocators_signals_come_from_what_was_reached(sequential):
    data = prunus.Calibration([torch.randn(16, 8)])
    what = {"layers": ["blocks.*"], "exclude": ["*.head"], "calibration": data}
    what |= {"sparsity": 0.5, "allocator": "owl", "sequential": sequential}
    with pytest.raises(ValueError, match="no calibration batch reached blocks"):
        prunus.prune(Blocks(), "wanda", **what)
    result = prunus.prune(Blocks(), "wanda", unreached="magnitude", **what)
    assert len(result.unreached) == 4
    assert result.sparsity == 0.5
    alone = ["blocks.0.cold", "blocks.1.hot"]
    # a block of which nothing is reached has the others' mean
    result = prunus.prune(Blocks(), "wanda", unreached="magnitude", **{**what, "layers": alone})
    assert result.unreached == {"blocks.0.cold": "magnitude"}
    with pytest.raises(ValueError, match="no calibration batch reached blocks.0.cold; nothing"):
        prunus.prune(Blocks(), "wanda", unreached="dense", **{**what, "layers": alone[:1]})


def test_a_table_may_name_what_no_data_reaches():
    table = {"first": 0.5, "hot": 0.25, "cold": 0.25, "never": 0.75}
    for unreached, cold in (("dense", [0, 0]), ("magnitude", [0.25, 0.75])):
        what = {"allocator": table, "calibration": inputs(), "unreached": unreached}
        result = prunus.prune(Routed(), "wanda", layers=EXPERTS, **what)
        assert [row.sparsity for row in result.rows] == [0.5, 0.25, *cold]


def test_permuting_leaves_alone_what_it_knows_nothing_of():
    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)
            self.idle = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

        def forward(self, x):
            return self.down(self.up(x).relu())

    what = {"pattern": "2:4", "permute": "lsa", "layers": "*", "calibration": inputs()}
    with pytest.raises(ValueError, match=r"reached idle.0, idle.2; nothing was pruned"):
        prunus.prune(Mlp(), "wanda", **what)
    result = prunus.prune(Mlp(), "wanda", unreached="dense", **what)
    assert set(result.unreached) == {"idle.0", "idle.2"}
    assert "idle.2" in result.not_permuted


def test_what_was_done_is_told_in_result_log_and_report(caplog, tmp_path):
    _, _, run = pruned("wanda", "dense")
    with caplog.at_level(logging.INFO, "prunus"):
        result = run()
    line = "left as they are, because no calibration data tells of them: cold, never"
    assert line in str(result)
    assert line in caplog.text
    result.report(tmp_path)
    assert "none tells of cold (dense), never (dense)" in (tmp_path / "report.html").read_text()


def test_a_sweep_tells_it_too():
    result = prunus.sweep(
        Routed(), "wanda", [0.25, 0.5], lambda m: float(prunus.sparsity(m)), layers=EXPERTS,
        calibration=inputs(), unreached="magnitude",
    )  # fmt: skip
    assert "pruned by magnitude, because no calibration data tells of them: cold" in str(result)


def test_in_training_such_layers_go_on_dense_and_records_say_so():
    model = Routed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = """
    modifiers:
      - prune: {pruner: wanda, sparsity: 0.5, layers: [first, hot, cold], unreached: dense}
    """
    with prunus.attach(model, optimizer, recipe, calibration=inputs()) as session:
        for _ in range(2):
            model(torch.randn(4, 8)).square().mean().backward()
            optimizer.step()
            assert model.cold.weight.count_nonzero() == 64
    (event,) = (e for e in session.recorder.events if e["event"] == "prune")
    assert event["unreached"] == {"cold": "dense"}
    assert Summary(session.recorder.events).unreached == ["cold (dense)"]
    assert session.sparsity == pytest.approx(1 / 3)


def test_movement_knows_nothing_of_what_training_never_moved():
    def trained(**option):
        model = Routed()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        entry = {"sparsity": 0.5, "layers": ("first", "never"), **option}
        recipe = prunus.Recipe((MODIFIERS["movement"](**entry),))
        session = prunus.attach(model, optimizer, recipe)
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        session.close()
        return model, session

    with pytest.raises(ValueError, match="no step of training has a gradient of never; nothing"):
        trained()
    model, _ = trained(unreached="dense")
    assert model.never.weight.count_nonzero() == 64
    assert model.first.weight.count_nonzero() == 32


def test_options_are_checked_where_they_are_written():
    with pytest.raises(ValueError, match="unreached='magnitud' is not known; did you mean 'magn"):
        prunus.prune(Routed(), "wanda", sparsity=0.5, unreached="magnitud")
    with pytest.raises(ValueError, match="misfits='sparse' is not known; one of: dense, error"):
        prunus.sweep(Routed(), "wanda", [0.5], float, misfits="sparse")
    text = "modifiers: [{prune: {sparsity: 0.5, unreached: never}}]"
    with pytest.raises(ValueError, match="'error', 'magnitude' or 'dense'"):
        prunus.Recipe.load(text)
    with pytest.raises(ValueError, match="unreached belong in the recipe"):
        prunus.prune(Routed(), text.replace("never", "dense"), unreached="dense")
