"""Weights of sparse convolutions are weights: every pruner prunes them, offset by offset too."""

import pytest
import torch
from torch import nn

import prunus
from prunus import spatial

from tests.spatial.scenes import scene


def net():
    torch.manual_seed(0)
    return spatial.SparseSequential(
        spatial.SubMConv2d(4, 8, 3), nn.BatchNorm1d(8), nn.ReLU(),
        spatial.SparseConv2d(8, 16, 3, 2, 1), nn.ReLU(),
        spatial.SubMConv2d(16, 8, 3), spatial.SparseGlobalAvgPool(), nn.Linear(8, 3),
    )  # fmt: skip


LAYERS = ["0", "3", "5"]


def data():
    samples = [scene((12, 12), 3, 4, 0.3, seed, torch.float32) for seed in range(4)]
    return [(x, torch.tensor([0, 1, 2])) for x in samples]


@pytest.mark.parametrize("pruner", ["magnitude", "wanda", "ria", "sparsegpt", "obs", "fastcap"])
def test_pruners_prune_sparse_convolutions(pruner):
    model = net()
    calibration = prunus.Calibration(data(), nn.functional.cross_entropy)
    prunus.prune(model, pruner, sparsity=0.5, layers=LAYERS, calibration=calibration)
    for name in LAYERS:
        weight = model[int(name)].weight
        assert float((weight == 0).float().mean()) == pytest.approx(0.5, abs=0.25)


def test_wanda_of_a_submanifold_layer_is_that_of_its_input_matrix():
    model, batches = net(), data()
    weight = model[0].weight.detach().clone()
    rows = torch.cat([model[0].input_matrix(x) for x, _ in batches])
    scores = weight.flatten(1).abs() * rows.square().sum(0).sqrt()
    calibration = prunus.Calibration(batches)
    prunus.prune(model, "wanda", sparsity=0.5, layers=["0"], pattern="row", calibration=calibration)
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept.scatter_(1, scores.argsort(1)[:, scores.shape[1] // 2 :], True)
    assert torch.equal(model[0].weight.flatten(1) != 0, kept)


def test_whole_kernel_offsets_are_a_pattern_and_are_then_skipped():
    model = net().eval()
    conv = model[5]
    expected_norms = conv.matrices().detach().flatten(1).abs().sum(1)
    pattern = spatial.offset_pattern(conv)
    assert pattern == "8x16"
    prunus.prune(model, "magnitude", sparsity=4 / 9, layers=["5"], pattern=pattern)
    gone = (conv.matrices() == 0).flatten(1).all(1)
    assert sorted(gone.nonzero().flatten().tolist()) == sorted(
        expected_norms.argsort()[:4].tolist()
    )
    x = scene((12, 12), 3, 16, 0.3, dtype=torch.float32)
    _, whole = conv._kernel_map(x)
    assert conv._without_empty_offsets(conv.matrices(), whole).count < whole.count


def test_masks_hold_while_training():
    model, batches = net(), data()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    recipe = "modifiers: [{prune: {pruner: magnitude, layers: ['0', '3', '5'], sparsity: 0.6}}]"
    losses = []
    with prunus.attach(model, optimizer, recipe, steps_per_epoch=4, epochs=5):
        for _ in range(5):
            for x, y in batches:
                loss = nn.functional.cross_entropy(model(x), y)
                losses.append(loss.item())
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    assert losses[-1] < losses[0]
    zeros = sum(int((model[int(n)].weight == 0).sum()) for n in LAYERS)
    assert zeros == round(0.6 * sum(model[int(n)].weight.numel() for n in LAYERS))
