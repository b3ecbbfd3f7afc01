"""The Fisher matrix as an object."""

import pytest
import torch
from torch import nn

import prunus

from tests.oracles.pruning import small_cnn, small_mlp

mse = nn.functional.mse_loss


def data(number=5, shape=(8,)):
    return [
        (torch.randn(4, *shape, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64))
        for _ in range(number)
    ]


def gradients(model, name, batches):
    model.eval()
    weight = dict(model.named_parameters())[f"{name}.weight"]
    return [torch.autograd.grad(mse(model(x), y), weight)[0] for x, y in batches]


@pytest.mark.parametrize(
    ("name", "build", "shape"), [("2", small_mlp, (8,)), ("5", small_cnn, (3, 8, 8))]
)
def test_a_product_with_the_fisher_is_the_mean_of_products_with_gradients(name, build, shape):
    model, batches = build(torch.float64), data(shape=shape)
    width = model.get_submodule(name).weight.flatten(1).shape[1]
    settings = prunus.OBS(block_size=width, damp=0.25)
    result = prunus.fisher(model, prunus.Calibration(batches, mse), layers=name, settings=settings)
    w = model.get_submodule(name).weight.detach()
    v = torch.randn_like(w)
    product, diagonal = 0.25 * v, torch.full_like(v, 0.25)
    for g in gradients(model, name, batches):
        inner = (g * v).flatten(1).sum(1).view(-1, *[1] * (v.dim() - 1))  # rows are blocks
        product = product + g * inner / len(batches)
        diagonal = diagonal + g.square() / len(batches)
    torch.testing.assert_close(result.mul({name: v})[name].to(v), product)
    torch.testing.assert_close(result.diag()[name].to(v), diagonal, rtol=1e-5, atol=1e-7)


def test_an_inverse_block_is_the_inverse_of_its_part():
    model, batches = small_mlp(torch.float64), data(number=30)
    settings = prunus.OBS(block_size=12, damp=0.1)
    result = prunus.fisher(model, prunus.Calibration(batches, mse), settings=settings)
    assert list(result) == ["0", "2"]
    g = torch.stack([g[1, 24:32] for g in gradients(model, "2", batches)])  # 12, 12 and 8 columns
    dense = g.T @ g / 30 + 0.1 * torch.eye(8, dtype=torch.float64)
    inverse = result.inverse_block("2", 5)
    torch.testing.assert_close(inverse @ dense, torch.eye(8, dtype=torch.float64))
    with pytest.raises(IndexError, match="block 48 of 48"):
        result["2"].inverse_block(48)
    with pytest.raises(KeyError, match="no layer '22'; did you mean '2'"):
        result["22"]


def test_a_fisher_over_the_memory_is_refused():
    calibration = prunus.Calibration(data(), mse, memory=100)
    with pytest.raises(ValueError, match="takes .* bytes, and the memory for it is 100; take"):
        prunus.fisher(small_mlp(torch.float64), calibration)
