"""Criteria and compensation, against their definitions written out."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import prunus
from prunus.channels import CRITERIA, Evidence, channels, shrink
from prunus.channels.criteria.obs import Side, eliminate
from prunus.channels.moments import input_matrix, weight_matrix

from tests.channels.channel_oracles import randomized


def network():
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3))
    return randomized(net).float()


def batches(n=4):
    torch.manual_seed(3)
    return [(torch.randn(8, 3, 7, 7), torch.randn(8, 5, 3, 3)) for _ in range(n)]


def evidence(model):
    found = channels(model, batches()[0][0])
    return Evidence(model, found, prunus.Calibration(batches(), F.mse_loss))


def reader_inputs(model):
    with torch.no_grad():
        return torch.cat([input_matrix(model[3], model[:3](x)) for x, _ in batches()])


def scores(name, **settings):
    model = network()
    known = evidence(model)
    return model, CRITERIA[name](**settings).score(known.found.groups, known)["0"]


@pytest.mark.parametrize("p", [1, 2])
def test_magnitude_sums_relative_norms_of_writer_and_reader(p):
    model, found = scores("magnitude", p=p)
    writer = model[0].weight.detach().flatten(1).norm(p, dim=1)
    reader = model[3].weight.detach().transpose(0, 1).flatten(1).norm(p, dim=1)
    expected = writer / writer.mean() + reader / reader.mean()
    assert torch.allclose(found.float(), expected, rtol=1e-5)


def test_gamma_is_the_scale_of_the_batch_norm():
    model, found = scores("gamma")
    assert torch.allclose(found.float(), model[1].weight.detach().abs())


def test_activation_is_the_mean_of_what_the_reader_sees():
    model, found = scores("activation")
    x = reader_inputs(model).view(-1, 6, 9).abs().mean((0, 2))
    assert torch.allclose(found.float(), x / x.mean(), rtol=1e-4)


def test_flap_is_variance_times_squared_columns_standardized():
    model, found = scores("flap")
    x = reader_inputs(model)
    w = model[3].weight.detach().flatten(1)
    raw = (x.var(0, unbiased=False) * w.square().sum(0)).view(6, 9).sum(1)
    assert torch.allclose(found.float(), (raw - raw.mean()) / raw.std(), rtol=1e-3, atol=1e-4)


def test_taylor_is_the_squared_first_order_change():
    model, found = scores("taylor")
    total = torch.zeros(6)
    for x, y in batches():
        model.zero_grad()
        F.mse_loss(model(x), y).backward()
        change = (model[0].weight * model[0].weight.grad).flatten(1).sum(1)
        change += model[0].bias * model[0].bias.grad
        change += model[1].weight * model[1].weight.grad + model[1].bias * model[1].bias.grad
        total += change.detach() ** 2
    assert torch.allclose(found.float(), total, rtol=1e-4)


def test_random_scores_repeat_with_their_seed():
    (_, a), (_, b), (_, c) = scores("random"), scores("random"), scores("random", seed=1)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def least_squares_loss(w, gram, keep):
    """The smallest error of weights on the kept columns alone, by the pseudo-inverse."""
    best = w @ gram[:, keep] @ torch.linalg.pinv(gram[keep][:, keep])
    gap = w.clone()
    gap[:, keep] -= best
    return float(((gap @ gram) * gap).sum())


@pytest.mark.parametrize("width", [1, 2])
def test_each_elimination_is_the_cheapest_and_costs_what_least_squares_costs(width):
    torch.manual_seed(0)
    units = 5
    d = units * width
    w = torch.randn(4, d).double()
    x = torch.randn(60, d).double() @ torch.randn(d, d).double()
    gram = x.t() @ x
    columns = torch.arange(d).view(units, width)
    found = eliminate([Side(w.clone(), torch.linalg.inv(gram), columns, 1.0)])
    order = found.argsort().tolist()
    for step in range(units - 1):
        gone = order[:step]
        losses = {}
        for unit in set(range(units)) - set(gone):
            keep = [c for u in range(units) if u not in (*gone, unit) for c in columns[u].tolist()]
            losses[unit] = least_squares_loss(w, gram, keep)
        best = min(losses, key=losses.get)
        assert order[step] == best
        assert float(found[best]) == pytest.approx(losses[best], rel=1e-6)


def output_error(dense, model, x):
    with torch.no_grad():
        return float((dense(x) - model(x)).square().mean())


@pytest.mark.parametrize("criterion", ["magnitude", "activation", "obs", "flap"])
def test_refitting_lowers_the_error_and_the_bias_alone_less(criterion):
    errors = {}
    for update in ("none", "bias", "weights"):
        model = network()
        for module in model.modules():  # so that no statistics are estimated anew
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0
        net = nn.Sequential(model[0], model[2], model[3])
        dense = copy.deepcopy(net)
        data = prunus.Calibration(batches(), F.mse_loss)
        kept = False if update == "none" and criterion in ("magnitude", "activation") else update
        if kept == "none":
            continue
        shrink(
            net,
            batches()[0][0],
            criterion,
            allocator={"0": 0.5},
            calibration=data,
            compensate=kept,
            measure=False,
        )
        errors[update] = output_error(dense, net, torch.cat([x for x, _ in batches()]))
    assert errors["weights"] < errors["bias"]
    assert "none" not in errors or errors["bias"] < errors["none"]


def test_refitted_weights_are_the_least_squares_solution():
    model = network()
    net = nn.Sequential(model[0], model[2], model[3])
    dense = copy.deepcopy(net)
    data = prunus.Calibration(batches(), F.mse_loss)
    result = shrink(
        net, batches()[0][0], allocator={"0": 0.5}, calibration=data, compensate=True, measure=False
    )
    keep = result.kept["2.weight"][1].repeat_interleave(9)
    with torch.no_grad():
        x = torch.cat([input_matrix(dense[2], dense[:2](b)) for b, _ in batches()]).double()
    y = x @ weight_matrix(dense[2]).double().t() + dense[2].bias.detach().double()
    design = torch.cat([x[:, keep], torch.ones(len(x), 1).double()], 1)
    best = torch.linalg.lstsq(design, y).solution
    ours = torch.cat([weight_matrix(net[2]), net[2].bias.detach().unsqueeze(1)], 1).double().t()
    worst, found = ((design @ s - y).square().sum() for s in (best, ours))
    assert float(found) <= 1.001 * float(worst)


def test_batch_norm_is_estimated_anew_where_there_is_data():
    model = network()
    data = prunus.Calibration(batches(), F.mse_loss)
    shrink(model, batches()[0][0], target={"macs": 0.5}, calibration=data, measure=False)
    with torch.no_grad():
        x = torch.stack([model[0](b).mean((0, 2, 3)) for b, _ in batches()]).mean(0)
    assert torch.allclose(model[1].running_mean, x, atol=1e-5)


def test_data_that_never_reach_a_reader_are_refused():
    empty = prunus.Calibration([], F.mse_loss)
    with pytest.raises(ValueError, match="never reached"):
        shrink(network(), batches()[0][0], "flap", {"macs": 0.5}, calibration=empty, measure=False)


def test_every_criterion_is_listed():
    assert list(CRITERIA) == sorted(
        ["activation", "flap", "gamma", "magnitude", "obs", "random", "taylor"]
    )
    assert all(CRITERIA[name]().name == name for name in itertools.chain(CRITERIA))
