"""Fisher matrices on two ranks: the same masks and weights as in one process."""

import math

import pytest
import torch
from torch import nn

import prunus

from tests.distributed import workers
from tests.distributed.workers import batches, net, outcome, whole_masks, whole_state, wrapped

mse = nn.functional.mse_loss


def data_for(how, number=6):
    """Under DDP each rank's batches are samples of their own; under FSDP2 halves of one."""
    if how != "union":
        return batches(number)
    return [(x[r::2], y[r::2]) for x, y in batches(number) for r in range(2)]


def _pruned(how, pruner, arguments, memory=None):
    model = wrapped(net(), how)
    if arguments.pop("zeros", False):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(parameter.abs() > 0.1)
    calibration = prunus.Calibration(data_for(how), mse, memory=memory)
    result = prunus.prune(model, pruner, layers="*", calibration=calibration, **arguments)
    return {
        "weights": whole_state(model),
        "masks": whole_masks(model, result.masks),
        "rows": [(row.name, row.zeros) for row in result.rows],
    }


def assert_same(answer, one):
    assert answer["rows"] == one["rows"]
    for name, mask in one["masks"].items():
        assert torch.equal(answer["masks"][name], mask), name
    for name, weight in one["weights"].items():
        torch.testing.assert_close(answer["weights"][name], weight, rtol=1e-9, atol=1e-12)


FISHER = {"block_size": 5, "damp": 1e-4}
METHODS = {
    "obs": (prunus.OBS(**FISHER), {"sparsity": 0.6}),
    "obs-4x1": (
        prunus.OBS(**FISHER),
        {"sparsity": 0.5, "pattern": "4x1", "exclude": ["odd", "single"]},
    ),
    "cap": (prunus.CAP(**FISHER), {"sparsity": 0.6}),
    "cap-zeros": (prunus.CAP(**FISHER), {"sparsity": 0.8, "allocator": "uniform", "zeros": True}),
    "cap-row": (prunus.CAP(**FISHER), {"sparsity": 0.6, "pattern": "row"}),
    "cap-2:4": (prunus.CAP(block_size=8, damp=1e-4), {"pattern": "2:4"}),
    "cap-twice": (prunus.CAP(num_recomputations=2, num_grads=4, **FISHER), {"sparsity": 0.6}),
    "fastcap": (prunus.FastCAP(), {"sparsity": 0.6}),
    "fastcap-2:4": (prunus.FastCAP(), {"pattern": "2:4"}),
}


@pytest.mark.parametrize("method", METHODS)
def test_data_parallel_ranks_share_the_work_and_use_all_gradients(ranks, method):
    pruner, arguments = METHODS[method]
    if method == "cap-twice":  # the second stage would take other batches
        arguments = {**arguments, "pattern": "2:4", "sparsity": None}
        pruner = prunus.CAP(num_recomputations=2, block_size=8, damp=1e-4)
    one = _pruned("union", pruner, dict(arguments))
    for answer in ranks(_pruned, "ddp", pruner, arguments):
        assert_same(answer, one)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "obs-4x1"])
def test_sharded_ranks_keep_the_fisher_of_their_rows(ranks, method):
    pruner, arguments = METHODS[method]
    one = _pruned("plain", pruner, dict(arguments))
    for answer in ranks(_pruned, "fsdp", pruner, arguments):
        assert_same(answer, one)


def test_gradients_of_examples_are_shared_by_data_parallel_ranks(ranks):
    pruner = prunus.CAP(samples="example", **FISHER)
    one = _pruned("union", pruner, {"sparsity": 0.6})
    for answer in ranks(_pruned, "ddp", pruner, {"sparsity": 0.6}):
        assert_same(answer, one)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_plan_of_several_passes_gives_the_same_on_ranks(ranks, how):
    pruner, arguments = METHODS["cap"]
    one = _pruned("union" if how == "ddp" else "plain", pruner, dict(arguments))
    for answer in ranks(_pruned, how, pruner, arguments, 8000):
        assert_same(answer, one)


def test_fewer_gradients_than_ranks_are_still_dealt_out(ranks):
    pruner = prunus.CAP(num_grads=1, **FISHER)
    answers = ranks(_pruned, "ddp", pruner, {"sparsity": 0.6})
    assert_same(answers[0], answers[1])


RECIPE = """
modifiers:
  - prune:
      pruner: {name: cap, block_size: 5, damp: 1e-4}
      layers: ["*"]
      sparsity: {from: 0.2, to: 0.8, curve: cubic}
      window: {from: 1step, to: 6step, every: 2step}
"""


def _trained(how):
    model = wrapped(net(), how)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    calibration = prunus.Calibration(data_for(how), mse)
    session = prunus.attach(model, optimizer, RECIPE, calibration=calibration)
    for x, y in batches(workers.STEPS):
        mse(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    session.close()
    return {
        "weights": whole_state(model),
        "masks": whole_masks(model, session.masks),
        "rows": [(row.name, row.zeros) for row in session.runs[0].rows],
    }


@pytest.mark.parametrize(("how", "alone"), [("ddp", "union"), ("fsdp", "plain")])
def test_training_with_pruning_steps_is_that_of_one_process(ranks, how, alone):
    one = _trained(alone)
    for answer in ranks(_trained, how):
        assert_same(answer, one)


def _uneven():
    model = wrapped(net(), "ddp")
    data = batches(3 if workers.world()[0] == 0 else 1)
    calibration = prunus.Calibration(data, mse)
    prunus.prune(model, "cap", sparsity=0.5, layers="*", calibration=calibration)
    return whole_state(model)


def test_ranks_may_have_different_numbers_of_batches(ranks):
    first, second = ranks(_uneven)
    assert all(torch.equal(first[name], t) for name, t in second.items())


def _fails(how, where):
    model = wrapped(net(), how)
    before = whole_state(model)

    def loss(output, y):
        if where == "loss" and workers.world()[0] == 1:
            raise ArithmeticError("no loss")
        return mse(output, y) * (math.nan if where == "nan" and workers.world()[0] == 1 else 1)

    calibration = prunus.Calibration(batches(4), loss)
    error = outcome(
        lambda: prunus.prune(model, "cap", sparsity=0.5, layers="*", calibration=calibration)
    )
    return error, all(torch.equal(t, before[n]) for n, t in whole_state(model).items())


def test_a_loss_that_fails_on_one_rank_fails_on_all(ranks):
    (other, untouched), (itself, untouched_too) = ranks(_fails, "ddp", "loss")
    assert itself == "ArithmeticError: no loss"
    assert other == "RuntimeError: rank 1 failed with ArithmeticError: no loss"
    assert untouched
    assert untouched_too


def test_gradients_that_are_nan_on_one_rank_name_its_batch(ranks):
    for error, untouched in ranks(_fails, "ddp", "nan"):
        assert "NaN or infinite, the first from batch 1 of rank 1; nothing was pruned" in error
        assert untouched


def _examples_sharded():
    return _pruned("fsdp", prunus.CAP(samples="example"), {"sparsity": 0.5})


def test_gradients_of_examples_are_refused_where_weights_are_sharded(ranks):
    for error in ranks(_outcome_of_examples):
        assert "hands out gradients of whole batches only; use samples='micro_batch'" in error


def _outcome_of_examples():
    return outcome(_examples_sharded)


def _bad_row():
    """Infinite in the gradient of the first output, which only the first rank holds."""
    model = wrapped(net(), "fsdp")
    before = whole_state(model)

    def forward(model, batch):
        output = model(batch[0])
        return mse(output, batch[1]) + output[0, 0] * math.inf

    calibration = prunus.Calibration(batches(4), forward=forward)
    error = outcome(
        lambda: prunus.prune(model, "cap", sparsity=0.5, layers="odd", calibration=calibration)
    )
    return error, all(torch.equal(t, before[n]) for n, t in whole_state(model).items())


def test_a_gradient_that_is_bad_in_the_rows_of_one_rank_is_bad_on_all(ranks):
    for error, untouched in ranks(_bad_row):
        assert "gradients of odd are NaN or infinite, the first from batch 1" in error
        assert untouched


class Normed(workers.Net):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        x = self.wide(torch.tanh(self.norm(self.conv(x))).mean((2, 3))).tanh()
        return torch.cat([self.odd(x), self.single(x)], 1)


def _recalibrated(how):
    torch.manual_seed(1)
    model = wrapped(Normed().double(), how)
    uneven = data_for(how, 6)[: 4 if workers.world()[0] == 0 else 6]
    data = prunus.Calibration(uneven if how == "fsdp" else data_for(how), mse)
    prunus.prune(model, "magnitude", sparsity=0.5, recalibrate=data)
    return whole_state(model)


def test_norms_are_estimated_from_the_data_of_all_ranks(ranks):
    one = _recalibrated("union")
    for state in ranks(_recalibrated, "ddp"):
        torch.testing.assert_close(state["norm.running_mean"], one["norm.running_mean"])
        torch.testing.assert_close(state["norm.running_var"], one["norm.running_var"])


def test_sharded_ranks_with_different_numbers_of_batches_recalibrate_on_what_they_share(ranks):
    first, second = ranks(_recalibrated, "fsdp")
    assert torch.equal(first["norm.running_mean"], second["norm.running_mean"])
