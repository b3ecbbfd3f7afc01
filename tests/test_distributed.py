"""Two processes over gloo against one process that sees all the data."""

from dataclasses import dataclass
from typing import ClassVar

import distributed_workers as workers
import pytest
import torch
from distributed_workers import Ranks, batches, net, one_shot, outcome, train, whole_state, wrapped
from torch import nn

import prunus
from prunus.pruners import PRUNERS, Proposal
from prunus.stats import InputNorm

RECIPE = """
modifiers:
  - prune:
      pruner: magnitude
      layers: {layers}
      allocator: {allocator}
      pattern: {pattern}
      sparsity: {{from: 0.2, to: 0.6, curve: cubic}}
      window: {{from: 1step, to: 6step, every: 2step}}
"""
FIXED = """
modifiers:
  - prune: {pruner: magnitude, layers: ["*"], pattern: "2:4", window: {from: 3step}}
"""
EVERY = '["*"]'
DIVISIBLE = "[conv, wide]"


def recipe(allocator="global", pattern="unstructured", layers=EVERY):
    return RECIPE.format(allocator=allocator, pattern=pattern, layers=layers)


RECIPES = {
    "global": recipe(),
    "uniform": recipe("uniform"),
    "erk": recipe("erk"),
    "row": recipe("uniform", "row"),
    "block": recipe("global", "4x1", DIVISIBLE),
    "2:4": FIXED,
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    group = Ranks(tmp_path_factory.mktemp("ranks"))
    yield group
    group.stop()


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


@pytest.mark.parametrize("name", ["global", "2:4"])
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
    events = prunus.records.read_records(tmp_path / "rank0")
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


@dataclass(frozen=True)
class InputScaled:
    """Wanda's score."""

    name: ClassVar[str] = "input_scaled"
    patterns: ClassVar[tuple[str, ...]] = ("unstructured", "row", "N:M", "block")
    allocator: ClassVar[str] = "uniform"

    def statistic(self, layer):
        return InputNorm(layer.matrix_shape()[1])

    def propose(self, w, stat, pattern):
        return Proposal(w.abs() * stat.norm, lambda mask: w)


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
        return {"weights": whole_state(model), "masks": workers.whole_masks(model, result.masks)}
    finally:
        del PRUNERS._classes["input_scaled"]


@pytest.mark.parametrize("pattern", ["unstructured", "row", "2:4"])
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_ranks_with_half_of_the_data_each_learn_what_one_process_does(ranks, how, pattern):
    one = _calibrated("plain", pattern)
    for answer in ranks(_calibrated, how, pattern):
        assert_bit_for_bit(answer, one)


# failures


def _with_nan(call):
    model = wrapped(net(), "fsdp")
    with torch.no_grad():
        if workers.world()[0] == 1:
            model.wide.weight.to_local()[-1, 3] = torch.nan
    before = whole_state(model)

    def sweep():
        prunus.sweep(model, "magnitude", [0.5], lambda model: 0.0, layers="*")

    def train_on():
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        text = recipe().replace("1step", "0step")
        with prunus.attach(model, optimizer, text):
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()

    calls = {
        "prune": lambda: prunus.prune(model, "magnitude", sparsity=0.5, layers="*"),
        "sweep": sweep,
        "attach": train_on,
    }
    error = outcome(calls[call])
    after = whole_state(model)
    return error, all(torch.equal(before[n].nan_to_num(7), after[n].nan_to_num(7)) for n in after)


@pytest.mark.parametrize("call", ["prune", "sweep", "attach"])
def test_a_nan_on_one_rank_is_the_same_error_on_all_and_changes_nothing(ranks, call):
    for error, untouched in ranks(_with_nan, call):
        assert error.startswith("ValueError: wide.weight has 1 NaN or infinite weights")
        assert untouched


class FailsOnOneRank(prunus.Magnitude):
    where: ClassVar[str] = ""

    def propose(self, w, stat, pattern):
        scores, rebuild = super().propose(w, stat, pattern)
        if workers.world()[0] == 1 and self.where == "scores":
            raise ArithmeticError("no inverse")

        def failing(mask):
            if workers.world()[0] == 1:
                raise ArithmeticError("no inverse")
            return rebuild(mask)

        return Proposal(scores, failing)


def _failing_pruner(where):
    model = wrapped(net(), "fsdp")
    before = whole_state(model)
    FailsOnOneRank.where = where
    error = outcome(lambda: prunus.prune(model, FailsOnOneRank(), sparsity=0.5, layers="*"))
    return error, all(torch.equal(t, before[n]) for n, t in whole_state(model).items())


@pytest.mark.parametrize("where", ["scores", "weights"])
def test_a_method_that_fails_on_one_rank_fails_on_all(ranks, where):
    (other, untouched), (itself, untouched_too) = ranks(_failing_pruner, where)
    assert itself == "ArithmeticError: no inverse"
    assert other == "RuntimeError: rank 1 failed with ArithmeticError: no inverse"
    assert untouched
    assert untouched_too


def _failing_data():
    model = wrapped(net(), "ddp")
    data = batches(2) if workers.world()[0] == 0 else []
    calibration = prunus.Calibration(data)
    return outcome(
        lambda: prunus.prune(
            model, InputScaled(), sparsity=0.5, layers="*", calibration=calibration
        )
    )


def test_a_rank_without_calibration_data_stops_all(ranks):
    other, itself = ranks(_failing_data)
    assert itself == "ValueError: the calibration data is empty; nothing was pruned"
    assert other == f"RuntimeError: rank 1 failed with {itself}"


def _blocks_across_shards():
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8))
    workers.fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    text = recipe(pattern="4x1")
    return outcome(lambda: prunus.attach(model, optimizer, text))


def test_a_block_that_shards_cut_through_is_refused_at_once(ranks):
    for error in ranks(_blocks_across_shards):
        assert error.startswith("ValueError: 0, cut over 2 ranks: block 4x1 does not divide 6")


# what is refused


def _optimizer_before_sharding():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped(model, "fsdp")
    return outcome(lambda: prunus.attach(model, optimizer, recipe()))


def test_an_optimizer_built_before_sharding_is_refused(ranks):
    for error in ranks(_optimizer_before_sharding):
        assert "the optimizer does not hold conv.weight" in error
        assert "built after the model was moved or sharded" in error


def _fsdp1(use_orig_params):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(
        net(), device_id=torch.device("cpu"), use_orig_params=use_orig_params
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return (
        outcome(lambda: prunus.attach(model, optimizer, recipe())),
        outcome(lambda: prunus.prune(model, "magnitude", sparsity=0.5)),
    )


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_is_refused_with_the_way_out(ranks, use_orig_params):
    for errors in ranks(_fsdp1, use_orig_params):
        for error in errors:
            assert error.startswith("ValueError: FSDP1 (FullyShardedDataParallel) flattens")
            assert "fully_shard" in error


# saving


def _saved(how, path, compact):
    model = wrapped(net(), how)
    result = prunus.prune(model, "magnitude", sparsity=0.7, layers="*")
    prunus.save(model, path, pruning=result, compact=compact)
    fresh = wrapped(net(), how)
    prunus.load(path, fresh)
    return (
        whole_state(model),
        workers.whole_masks(model, result.masks),
        whole_state(fresh),
    )


@pytest.mark.parametrize("compact", [False, True], ids=["dense", "compact"])
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_model_saved_on_two_ranks_loads_into_a_plain_and_a_wrapped_one(
    ranks, how, compact, tmp_path
):
    path = tmp_path / "model.safetensors"
    answers = ranks(_saved, how, path, compact)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    plain = net()
    checkpoint = prunus.load(path, plain)
    for weights, masks, reloaded in answers:
        assert checkpoint.masks.keys() == masks.keys()
        for name, t in plain.state_dict().items():
            assert torch.equal(t, weights[name])
            assert torch.equal(t, reloaded[name])
        assert all(torch.equal(mask, checkpoint.masks[name]) for name, mask in masks.items())


def _save_session(path):
    model = wrapped(net(), "fsdp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with prunus.attach(model, optimizer, recipe()) as session:
        for x, y in batches(workers.STEPS):
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    prunus.save(model, path, pruning=session)
    return whole_state(model), workers.whole_masks(model, session.masks)


def test_a_sharded_session_is_saved_with_its_masks(ranks, tmp_path):
    path = tmp_path / "model.safetensors"
    weights, masks = ranks(_save_session, path)[0]
    checkpoint = prunus.load(path)
    assert checkpoint.recipe is not None
    for name, mask in masks.items():
        assert torch.equal(checkpoint.masks[name], mask)
        assert torch.equal(checkpoint.state_dict[name], weights[name])


def _save_into_a_file(path):
    model = wrapped(net(), "fsdp")
    return outcome(lambda: prunus.save(model, path / "below" / "model.safetensors"))


def test_a_failed_write_is_known_to_all_ranks(ranks, tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    first, second = ranks(_save_into_a_file, blocker)
    assert first.startswith("NotADirectoryError")
    assert second.startswith("RuntimeError: rank 0 failed with NotADirectoryError")
