"""2:4 training: layers that are sparse both ways while they compute (`swap`, `linear`, `tiles`)."""

from prunus.execution.training.linear import SemiSparseActivationLinear, SemiSparseLinear
from prunus.execution.training.options import SemiSparse
from prunus.execution.training.swap import (
    flip_rate,
    flip_rates,
    refresh_masks,
    swap_linear_with_semi_sparse_linear,
    swap_semi_sparse_linear_with_linear,
)
from prunus.execution.training.tiles import legal_masks, tile_mask

__all__ = [
    "SemiSparse",
    "SemiSparseActivationLinear",
    "SemiSparseLinear",
    "flip_rate",
    "flip_rates",
    "legal_masks",
    "refresh_masks",
    "swap_linear_with_semi_sparse_linear",
    "swap_semi_sparse_linear_with_linear",
    "tile_mask",
]
