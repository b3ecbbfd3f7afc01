"""Two ranks: what fails fails on both, what is refused says why, and what is saved is whole."""

from typing import ClassVar

import pytest
import torch
from torch import nn

import prunus

from tests.distributed import workers
from tests.distributed.workers import (
    InputScaled,
    batches,
    net,
    outcome,
    recipe,
    whole_masks,
    whole_state,
    wrapped,
)

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

    def scores(self, w, stat, pattern, ranks):
        if workers.world()[0] == 1 and self.where == "scores":
            raise ArithmeticError("no inverse")
        return super().scores(w, stat, pattern, ranks)

    def rebuild(self, w, stat, mask):
        if workers.world()[0] == 1:
            raise ArithmeticError("no inverse")
        return super().rebuild(w, stat, mask)


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
        whole_masks(model, result.masks),
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
    return whole_state(model), whole_masks(model, session.masks)


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
