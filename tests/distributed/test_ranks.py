"""Two processes over gloo against one process that sees all the data."""

import pytest
import torch
from torch import nn

import prunus
from prunus.pruners import PRUNERS
from prunus.report.records import read_records

from tests.distributed import workers
from tests.distributed.workers import (
    InputScaled,
    batches,
    net,
    one_shot,
    outcome,
    recipe,
    train,
    whole_masks,
    whole_state,
    wrapped,
)

FIXED = """
modifiers:
  - prune: {pruner: magnitude, layers: ["*"], pattern: "2:4", window: {from: 3step}}
"""
DIVISIBLE = "[conv, wide]"
RECIPES = {
    "global": recipe(),
    "uniform": recipe("uniform"),
    "erk": recipe("erk"),
    "row": recipe("uniform", "row"),
    "block": recipe("global", "4x1", DIVISIBLE),
    "2:4": FIXED,
    "movement": recipe().replace("prune:\n      pruner: magnitude\n", "movement:\n"),
}


def assert_same(mine, theirs):
    for name, mask in theirs["masks"].items():
        assert torch.equal(mine["masks"][name], mask), name
    assert mine["masks"].keys() == theirs["masks"].keys()
    for name, weight in theirs["weights"].items():
        torch.testing.assert_close(mine["weights"][name], weight, rtol=1e-10, atol=1e-10)


def assert_bit_for_bit(mine, theirs):
    for kind in ("masks", "weights"):
        for name, t in theirs[kind].items():
            assert torch.equal(mine[kind][name], t), name


# training


@pytest.mark.parametrize("optimizer", ["adam", "momentum"])
@pytest.mark.parametrize("how", ["ddp", "fsdp", "hsdp"])
def test_training_on_two_ranks_prunes_as_one_process_does(ranks, how, optimizer):
    one = train("plain", RECIPES["global"], optimizer)
    assert sum(int(mask.sum()) for mask in one["masks"].values()) > 0
    for answer in ranks(train, how, RECIPES["global"], optimizer):
        assert_same(answer, one)


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "global"])
def test_sharded_training_prunes_as_one_process_does(ranks, name):
    one = train("plain", RECIPES[name])
    for answer in ranks(train, "fsdp", RECIPES[name]):
        assert_same(answer, one)


@pytest.mark.parametrize("at", [2, 4])
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_resuming_on_two_ranks_is_bit_for_bit_the_uninterrupted_run(ranks, how, at):
    uninterrupted = ranks(train, how, RECIPES["global"])[0]
    saved = ranks(train, how, RECIPES["global"], "adam", None, at)[0]["saved"]
    for answer in ranks(train, how, RECIPES["global"], "adam", saved):
        assert_bit_for_bit(answer, uninterrupted)


def test_movement_under_ddp_prunes_as_one_process_does(ranks):
    one = train("plain", RECIPES["movement"])
    for answer in ranks(train, "ddp", RECIPES["movement"]):
        assert_same(answer, one)


@pytest.mark.parametrize("name", ["global", "2:4", "movement"])
def test_a_state_saved_on_two_ranks_resumes_on_one_and_the_other_way_round(ranks, name):
    one = train("plain", RECIPES[name])
    from_two = ranks(train, "fsdp", RECIPES[name], "adam", None, 4)[0]["saved"]
    assert_same(train("plain", RECIPES[name], "adam", from_two), one)
    from_one = train("plain", RECIPES[name], "adam", None, 4)["saved"]
    for answer in ranks(train, "fsdp", RECIPES[name], "adam", from_one):
        assert_same(answer, one)


def test_only_the_first_rank_writes_records_and_they_count_all_ranks(ranks, tmp_path):
    answers = ranks(train, "fsdp", RECIPES["global"], "adam", None, workers.STEPS, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["rank0"]
    events = read_records(tmp_path / "rank0")
    one = train("plain", RECIPES["global"])
    for written, told, expected in zip(events, answers[1]["events"], one["events"], strict=True):
        for event in (written, told, expected):
            event.pop("time")
        assert written == told == expected


# one shot


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"sparsity": 0.45, "layers": "*"},
        {"sparsity": 0.45, "layers": "*", "allocator": "uniform"},
        {"sparsity": 0.45, "layers": "*", "allocator": "erk"},
        {"sparsity": 0.45, "layers": "*", "allocator": "uniform", "pattern": "row"},
        {"pattern": "2:4", "layers": "*"},
        {"sparsity": 0.45, "layers": ["conv", "wide"], "pattern": "4x1"},
    ],
    ids=["global", "uniform", "erk", "row", "2:4", "block"],
)
def test_one_shot_on_shards_prunes_as_one_process_does(ranks, arguments, ties):
    torch.manual_seed(5)
    one = one_shot("plain", ties, arguments)
    for answer in ranks(_seeded_one_shot, "fsdp", ties, arguments):
        assert_bit_for_bit(answer, one)
        assert answer["sparsity"] == one["sparsity"]
        for mine, theirs in zip(answer["rows"], one["rows"], strict=True):
            assert (mine.name, mine.kind, mine.zeros) == (theirs.name, theirs.kind, theirs.zeros)
            assert mine.score_lost == pytest.approx(theirs.score_lost)


def _seeded_one_shot(*args):
    torch.manual_seed(5)
    return one_shot(*args)


def _prune_after_evaluation():
    model = wrapped(net(), "fsdp")
    x = batches(1)[0][0]
    with torch.no_grad():
        model(x)
    prunus.prune(model, "magnitude", sparsity=0.5, layers="*")
    with torch.no_grad():
        return model(x), whole_state(model)


def test_pruning_after_an_evaluation_reaches_the_copies_that_fsdp_keeps(ranks):
    output, state = ranks(_prune_after_evaluation)[0]
    plain = net()
    plain.load_state_dict(state)
    assert sum(int((t == 0).sum()) for name, t in state.items() if "weight" in name) > 0
    half = batches(1)[0][0][0::2]
    torch.testing.assert_close(output, plain(half).detach(), rtol=1e-12, atol=1e-12)


def _sweep(how):
    model = wrapped(net(), how)
    before = whole_state(model)
    x = torch.linspace(-1, 1, 400, dtype=torch.float64).reshape(4, 4, 5, 5)

    def evaluate(model):
        with torch.no_grad():
            return {"sum": float(model(x).sum()), "square": float(model(x).square().sum())}

    first = evaluate(model)
    values = prunus.sweep(model, "magnitude", [0.2, 0.5, 0.9], evaluate, layers="*").values
    return values, before, whole_state(model), first, evaluate(model)


def test_a_sharded_sweep_measures_what_one_process_does_and_restores_bit_for_bit(ranks):
    one = _sweep("plain")[0]
    for values, before, after, first, last in ranks(_sweep, "fsdp"):
        assert first == last
        assert all(torch.equal(before[name], after[name]) for name in before)
        for sparsity, metrics in one.items():
            assert values[sparsity] == pytest.approx(metrics, rel=1e-10)


# calibration


def _calibrated(how, pattern):
    prunus.register_pruner(InputScaled)
    try:
        model = wrapped(net(), how)
        sparsity = None if pattern == "2:4" else 0.5
        calibration = prunus.Calibration(batches(4))
        result = prunus.prune(
            model,
            "input_scaled",
            sparsity=sparsity,
            pattern=pattern,
            layers="*",
            calibration=calibration,
        )
        return {"weights": whole_state(model), "masks": whole_masks(model, result.masks)}
    finally:
        del PRUNERS._classes["input_scaled"]


@pytest.mark.parametrize("pattern", ["unstructured", "row", "2:4"])
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_ranks_with_half_of_the_data_each_learn_what_one_process_does(ranks, how, pattern):
    one = _calibrated("plain", pattern)
    for answer in ranks(_calibrated, how, pattern):
        assert_bit_for_bit(answer, one)


# layers cut along their inputs


class Conv1D(nn.Module):
    """transformers' layer of this name: the weight is (inputs, outputs)."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.nf = outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x):
        return x @ self.weight


def _inputs_first(how, pruner, **arguments):
    torch.manual_seed(3)
    model = nn.Sequential(Conv1D(6, 5), nn.Unflatten(1, (5, 1, 1)), nn.ConvTranspose2d(5, 3, 2))
    if how == "fsdp":
        workers.fully_shard(model)
    data = prunus.Calibration([torch.ones(2, 6)])
    error = outcome(lambda: prunus.prune(model, pruner, layers="*", calibration=data, **arguments))
    return error, whole_state(model)


def test_layers_cut_along_their_inputs_are_pruned_without_a_pattern(ranks):
    error, state = _inputs_first("plain", "magnitude", sparsity=0.5)
    assert error == "no error"
    for answer in ranks(_inputs_first_halved):
        assert answer[0] == "no error"
        assert all(torch.equal(answer[1][name], t) for name, t in state.items())


def _inputs_first_halved():
    return _inputs_first("fsdp", "magnitude", sparsity=0.5)


def _inputs_first_refused():
    return (
        _inputs_first("fsdp", "magnitude", sparsity=0.5, pattern="row")[0],
        _inputs_first("fsdp", InputScaled(), sparsity=0.5, exclude="2")[0],
    )


def test_layers_cut_along_their_inputs_are_refused_where_columns_count(ranks):
    for row, data in ranks(_inputs_first_refused):
        assert row.startswith("ValueError: 0 is sharded along its inputs, so pattern 'row' cannot")
        assert data.startswith(
            "ValueError: 0: sharded along the inputs, which pruner 'input_scaled'"
        )
