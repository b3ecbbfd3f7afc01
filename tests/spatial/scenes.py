"""Random sparse tensors, and their dense twins."""

import torch

from prunus import spatial


def scene(shape=(7, 6, 8), batch=2, channels=3, density=0.2, seed=0, dtype=torch.float64):
    """Sites there or not independently, in random order, and their features."""
    generator = torch.Generator().manual_seed(seed)
    there = torch.rand(batch, *shape, generator=generator) < density
    indices = there.nonzero()
    indices = indices[torch.randperm(len(indices), generator=generator)]
    features = torch.randn(len(indices), channels, generator=generator, dtype=dtype)
    return spatial.SparseTensor(features, indices, shape, batch)
