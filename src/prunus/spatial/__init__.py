"""Sparse activations: convolutions over the sites of a grid where there is something.

Names and arguments are those of spconv, so that ``import prunus.spatial as spconv`` runs a network
that was written for it, on a CPU too. Plain torch operations, differentiable, in any precision.
"""

from prunus.spatial.activation import (
    SiteChoice,
    SparseInputs,
    SubMConvOnDense,
    run_sparse,
    sparse_inputs,
)
from prunus.spatial.convolution import (
    SparseConv2d,
    SparseConv3d,
    SparseConvolution,
    SparseInverseConv2d,
    SparseInverseConv3d,
    SubMConv2d,
    SubMConv3d,
    from_spconv,
    offset_pattern,
)
from prunus.spatial.dataflows import DATAFLOWS, convolve
from prunus.spatial.grouping import Group, padding_share, plan_groups
from prunus.spatial.maps import KernelMap, strided_map, submanifold_map
from prunus.spatial.modules import (
    SparseAvgPool2d,
    SparseAvgPool3d,
    SparseGlobalAvgPool,
    SparseMaxPool2d,
    SparseMaxPool3d,
    SparseSequential,
    ToDense,
)
from prunus.spatial.points import ball_query, farthest_point_sampling, nearest_neighbours
from prunus.spatial.tensor import Sites, SparseTensor
from prunus.spatial.tuning import apply_tuning, tune

SparseConvTensor = SparseTensor

__all__ = [
    "DATAFLOWS",
    "Group",
    "KernelMap",
    "SiteChoice",
    "Sites",
    "SparseAvgPool2d",
    "SparseAvgPool3d",
    "SparseConv2d",
    "SparseConv3d",
    "SparseConvTensor",
    "SparseConvolution",
    "SparseGlobalAvgPool",
    "SparseInputs",
    "SparseInverseConv2d",
    "SparseInverseConv3d",
    "SparseMaxPool2d",
    "SparseMaxPool3d",
    "SparseSequential",
    "SparseTensor",
    "SubMConv2d",
    "SubMConv3d",
    "SubMConvOnDense",
    "ToDense",
    "apply_tuning",
    "ball_query",
    "convolve",
    "farthest_point_sampling",
    "from_spconv",
    "nearest_neighbours",
    "offset_pattern",
    "padding_share",
    "plan_groups",
    "run_sparse",
    "sparse_inputs",
    "strided_map",
    "submanifold_map",
    "tune",
]
