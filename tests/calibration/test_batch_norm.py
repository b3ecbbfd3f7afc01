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
    torch.testing.assert_close(model[1].running_var, seen.var(1))


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


def recalibrated(model, inputs):
    prunus.prune(
        model,
        "magnitude",
        sparsity=0.5,
        layers=["0"],
        calibration=prunus.Calibration(inputs),
        recalibrate=True,
    )


@pytest.mark.parametrize("sizes", [[70], [35, 35], [64, 6], [1, 69], [69, 1], [1, 1, 68]])
def test_every_input_counts_once_whatever_the_sizes_of_batches(sizes):
    x = torch.randn(70, 6, dtype=torch.float64, generator=torch.manual_seed(0)) * 3 + 5
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)).double()
    recalibrated(model, list(x.split(sizes)))
    seen = model[0](x).detach()
    torch.testing.assert_close(model[1].running_mean, seen.mean(0))
    torch.testing.assert_close(model[1].running_var, seen.var(0))


def test_every_position_counts_once_whatever_the_sizes_of_images():
    images = [torch.randn(2, 3, side, side, dtype=torch.float64) + side for side in (4, 9, 12)]
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)).double()
    recalibrated(model, images)
    seen = torch.cat([model[0](x).transpose(0, 1).flatten(1) for x in images], 1).detach()
    torch.testing.assert_close(model[1].running_mean, seen.mean(1))
    torch.testing.assert_close(model[1].running_var, seen.var(1))


class Twice(nn.Module):
    """Calls one norm twice, by keyword, and another never."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.idle = nn.BatchNorm1d(4)

    def forward(self, x):
        h = self.linear(x)
        self.norm(input=h + 1)
        return self.norm(input=h)


def test_all_calls_of_a_norm_count_and_one_never_called_keeps_what_it_had():
    model = Twice().double()
    model.idle.running_mean.fill_(7)
    x = torch.randn(10, 4, dtype=torch.float64)
    prunus.prune(
        model,
        "magnitude",
        sparsity=0.5,
        layers=["linear"],
        calibration=prunus.Calibration([x[:7], x[7:]]),
        recalibrate=True,
    )
    h = model.linear(x).detach()
    torch.testing.assert_close(model.norm.running_mean, torch.cat([h, h + 1]).mean(0))
    torch.testing.assert_close(model.norm.running_var, torch.cat([h, h + 1]).var(0))
    assert torch.equal(model.idle.running_mean, torch.full((4,), 7.0).double())
    assert torch.equal(model.idle.running_var, torch.ones(4).double())
