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
