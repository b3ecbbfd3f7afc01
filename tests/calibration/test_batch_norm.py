"""BatchNorm statistics, estimated anew."""

import copy

import pytest
import torch
from torch import nn

import prunus

from tests.oracles.pruning import small_mlp

mse = nn.functional.mse_loss


def network(dtype=torch.float64):
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 4),
    ).to(dtype)


def batches(number=5, size=16):
    return [
        (
            torch.randn(size, 3, 8, 8, dtype=torch.float64) + i,
            torch.randn(size, 4, dtype=torch.float64),
        )
        for i in range(number)
    ]


def test_the_first_norm_gets_mean_and_variance_over_all_batches():
    model, data = network(), batches()
    calibration = prunus.Calibration(data, mse)
    prunus.prune(
        model, "magnitude", sparsity=0.5, layers="3", calibration=calibration, recalibrate=True
    )
    seen = torch.cat([model[0](x) for x, _ in data]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(model[1].running_mean, seen.mean(1))
    torch.testing.assert_close(model[1].running_var, seen.var(1, unbiased=False), rtol=1e-2, atol=0)


def test_modes_momenta_and_counts_are_as_before():
    model = network().train()
    model[4].momentum, model[4].training = 0.3, False
    mse(model(batches()[0][0]), torch.zeros(16, 4, dtype=torch.float64))
    prunus.prune(model, "magnitude", sparsity=0.5, recalibrate=prunus.Calibration(batches(), mse))
    assert (model[1].momentum, model[4].momentum) == (0.1, 0.3)
    assert (model[1].training, model[4].training) == (True, False)
    assert (model[1].num_batches_tracked, model[4].num_batches_tracked) == (1, 0)


@pytest.mark.parametrize("bad", [[], "fails"])
def test_data_that_fails_leaves_weights_and_statistics_untouched(bad):
    model = network()
    before = copy.deepcopy(model.state_dict())
    calls = []

    def loss(output, y):
        calls.append(1)
        if len(calls) > 3:
            raise ArithmeticError("late")
        return mse(output, y)

    data = prunus.Calibration(batches() if bad == "fails" else [], loss)
    with pytest.raises((ValueError, ArithmeticError), match="is empty|late"):
        prunus.prune(model, "magnitude", sparsity=0.5, recalibrate=data)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_sweep_recalibrates_at_each_sparsity_and_puts_the_statistics_back():
    model = network()
    before = copy.deepcopy(model.state_dict())
    data = prunus.Calibration(batches(), mse)
    seen = prunus.sweep(
        model, "magnitude", [0.2, 0.9], lambda m: float(m[4].running_var.sum()), recalibrate=data
    ).values
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    for sparsity, metrics in seen.items():
        pruned = copy.deepcopy(model)
        prunus.prune(pruned, "magnitude", sparsity=sparsity, recalibrate=data)
        assert metrics["value"] == pytest.approx(float(pruned[4].running_var.sum()))


def test_models_without_batch_norm_and_calls_without_data(caplog):
    caplog.set_level("INFO", "prunus")
    data = prunus.Calibration([torch.randn(2, 8)])
    prunus.prune(small_mlp(), "magnitude", sparsity=0.5, recalibrate=data)
    assert "no BatchNorm statistics to estimate anew" in caplog.text
    with pytest.raises(ValueError, match="recalibrate needs data"):
        prunus.prune(small_mlp(), "magnitude", sparsity=0.5, recalibrate=True)
