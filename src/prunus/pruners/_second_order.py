"""What the methods share that measure a `BlockFisher`: its settings, and pruning in stages."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from prunus.core.layers import Layer
from prunus.core.names import did_you_mean
from prunus.core.patterns import NM, Pattern
from prunus.pruners.base import RAMPS
from prunus.stats import DTYPES, SAMPLES, BlockFisher, Samples, Sampling


@dataclass(frozen=True)
class SecondOrder:
    """Settings of the Fisher matrix and of its recomputation."""

    block_size: int = 192
    """weights of a row that one block of the Fisher matrix holds; memory grows with it"""
    num_grads: int = 1024
    """gradients to average, each of one calibration batch (all of the data, where that is less)"""
    damp: float = 1e-8
    """added to the diagonal; absolute, so it means something else for batches of another size"""
    samples: Samples = "micro_batch"
    """a gradient for each calibration batch (`micro_batch`), or for each `example` in it"""
    num_recomputations: int = 1
    """prune in so many stages, each with a fresh Fisher matrix"""
    ramp: Literal["linear", "cubic", "geometric"] = "geometric"
    """sparsity over the stages; geometric: each keeps the same share of what is left"""
    device: str | None = None
    """where the Fisher matrix is stored; default: where the weights are"""
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    """in which it is stored (bfloat16: as factors, which take longer to add up); it is always
    solved in float64"""

    def __post_init__(self) -> None:
        for name in ("block_size", "num_grads", "num_recomputations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; at least 1 is needed")
        for name, known in (("samples", SAMPLES), ("ramp", RAMPS), ("dtype", DTYPES)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"unknown {name} {value!r}{did_you_mean(value, known)}")
        if not (0 < self.damp < math.inf):
            raise ValueError(f"damp={self.damp}; a number above 0 is needed, such as 1e-7")

    def statistic(self, layer: Layer) -> BlockFisher:
        rows, cols = layer.matrix_shape(tuple(layer.local.shape))
        exact = layer.weight.dtype == torch.float64
        return BlockFisher(
            rows,
            cols,
            sampling=Sampling(self.num_grads, self.samples),
            block_size=self.block_size,
            damp=self.damp,
            device=self.device,
            dtype=torch.float64 if exact else DTYPES[self.dtype],
        )

    def check(self, cols: int, pattern: Pattern) -> None:
        """Raises ValueError if a group of the pattern would lie in two blocks."""
        group = pattern.m if isinstance(pattern, NM) else getattr(pattern, "cols", 1)
        if self.block_size < cols and self.block_size % group:
            near = max(group, self.block_size // group * group)
            raise ValueError(
                f"block_size={self.block_size} cuts the groups of pattern '{pattern}'; use {near}"
            )
