"""What a pruning step leaves behind."""

import pytest
import torch
from torch import nn

import prunus

from tests.oracles.pruning import small_mlp

METHODS = {
    "magnitude": prunus.Magnitude(),
    "obs": prunus.OBS(block_size=8),
    "recomputed": prunus.CAP(block_size=8, num_recomputations=2),
    "sparsegpt": prunus.SparseGPT(),
}


@pytest.mark.parametrize("pruner", METHODS.values(), ids=METHODS)
def test_pruning_inside_an_autocast_region_leaves_no_cached_casts_of_the_old_weights(pruner):
    model, x = small_mlp(), torch.randn(8, 8)
    data = prunus.Calibration([(x, torch.randint(4, (8,)))] * 2, nn.functional.cross_entropy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dense = model(x)
        prunus.prune(model, pruner, sparsity=0.75, calibration=data)
        inside = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outside = model(x)
    assert torch.equal(inside, outside)
    assert not torch.equal(inside, dense)


@pytest.mark.parametrize("pruner", [prunus.Magnitude(), prunus.OBS(block_size=8)])
@pytest.mark.parametrize("pattern", ["4x1", "2:4"])
def test_zeros_in_blocks_and_groups_that_stay_are_pruned_in_the_mask_too(pruner, pattern):
    model, x = small_mlp(), torch.randn(8, 8)
    data = prunus.Calibration([(x, torch.randint(4, (8,)))] * 2, nn.functional.cross_entropy)
    prunus.prune(model, "magnitude", sparsity=0.6, layers=["0", "2"])
    dead = {name: model.get_parameter(name) == 0 for name in ("0.weight", "2.weight")}
    sparsity = 0.5 if pattern == "4x1" else None
    result = prunus.prune(model, pruner, pattern=pattern, sparsity=sparsity, calibration=data)
    assert result.masks.keys() == dead.keys()
    for name, mask in result.masks.items():
        assert not (mask & dead[name]).any()
        assert torch.equal(model.get_parameter(name) != 0, mask)


class Negative(prunus.Magnitude):
    def scores(self, w, stat, pattern, ranks):
        return super().scores(w, stat, pattern, ranks) - 100


@pytest.mark.parametrize("pattern", ["unstructured", "row"])
def test_what_is_pruned_goes_before_the_lowest_score_there_is(pattern):
    model = small_mlp()
    prunus.prune(model, "magnitude", sparsity=0.5, pattern=pattern)
    dead = {name: p == 0 for name, p in model.named_parameters()}
    result = prunus.prune(model, Negative(), sparsity=0.75, pattern=pattern)
    assert result.sparsity == pytest.approx(0.75, abs=1e-3)
    assert not any((mask & dead[name]).any() for name, mask in result.masks.items())
