"""FastCAP: one Fisher matrix for all rows of a layer, and a sweep over its columns.

D. Kuznedelev, E. Kurtic, E. Frantar, D. Alistarh, "CAP: correlation-aware pruning for
highly-accurate sparse vision models", 2023, https://arxiv.org/abs/2210.09223, section 3.2;
the sweep is SparseGPT's (https://arxiv.org/abs/2301.00774) with this matrix in place of the Gram
matrix of the inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunus.core.layers import Layer
from prunus.core.names import did_you_mean
from prunus.core.patterns import NM, Pattern
from prunus.core.ranks import Ranks
from prunus.pruners._stripes import choice, stripe_counts
from prunus.pruners.base import JointPruner, register_pruner
from prunus.solvers.column_sweep import sweep_columns, upper_factor
from prunus.solvers.least_squares import unit_of
from prunus.stats import SAMPLES, Samples, Sampling, SharedFisher


@register_pruner
@dataclass(frozen=True)
class FastCAP(JointPruner):
    """Sweep over the columns with a Fisher matrix that all rows share: ``F = 2/m sum g g^T``.

    Score ``w^2 / U_jj^2`` with ``U^T U = F^-1``; the error of what goes is passed on to the columns
    to the right. Needs few gradients and little memory.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> batches = [(torch.randn(4, 8), torch.randn(4, 2)) for _ in range(4)]
    >>> data = prunus.Calibration(batches, nn.functional.mse_loss)
    >>> prunus.prune(model, prunus.FastCAP(num_grads=4), sparsity=0.5, calibration=data).sparsity
    0.5
    """

    name: ClassVar[str] = "fastcap"
    patterns: ClassVar[tuple[str, ...]] = ("unstructured", "N:M")

    block_size: int | None = None
    """columns of the shared matrix; default: all of a row"""
    num_grads: int = 256
    """gradients to average, each of one calibration batch (all of the data, where that is less)"""
    damp: float = 1e-2
    """added to the diagonal, relative to its mean"""
    samples: Samples = "micro_batch"
    """a gradient for each calibration batch (`micro_batch`), or for each `example` in it"""
    device: str | None = None
    """where the Fisher matrix is stored; default: where the weights are"""

    def __post_init__(self) -> None:
        if self.num_grads < 1 or (self.block_size is not None and self.block_size < 1):
            raise ValueError("num_grads and block_size must be at least 1")
        if self.samples not in SAMPLES:
            raise ValueError(
                f"unknown samples {self.samples!r}{did_you_mean(self.samples, SAMPLES)}"
            )
        if not (0 < self.damp < math.inf):
            raise ValueError(f"damp={self.damp}; a number above 0 is needed, such as 1e-2")

    def check(self, cols: int, pattern: Pattern) -> None:
        """Raises ValueError if a group of the pattern would lie in two blocks."""
        d = self.block_size
        if isinstance(pattern, NM) and d is not None and d < cols and d % pattern.m:
            near = max(pattern.m, d // pattern.m * pattern.m)
            raise ValueError(f"block_size={d} cuts the groups of pattern '{pattern}'; use {near}")

    def statistic(self, layer: Layer) -> SharedFisher:
        cols = layer.matrix_shape()[1]
        sampling = Sampling(self.num_grads, self.samples)
        exact = layer.weight.dtype == torch.float64
        return SharedFisher(
            cols,
            sampling=sampling,
            block_size=self.block_size,
            device=self.device,
            dtype=torch.float64 if exact else torch.float32,
        )

    def solve(
        self, w: Tensor, stat: SharedFisher, pattern: Pattern, drop: int, ranks: Ranks
    ) -> tuple[Tensor, Tensor]:
        d, whole = stat.block_size, stat.cols // stat.block_size * stat.block_size
        cuts = [slice(0, whole)] + [slice(whole, stat.cols)] * (whole < stat.cols)
        dtype = torch.promote_types(w.dtype, torch.float32)
        sizes = [min(d, cut.stop - cut.start) for cut in cuts]
        parts = [
            w[:, cut].reshape(len(w) * (cut.stop - cut.start) // size, size).to(dtype)
            for cut, size in zip(cuts, sizes, strict=True)
        ]
        counts: list[list[int]] = [[]] * len(parts)
        if pattern.fixed is None:
            counts = stripe_counts(parts, drop, ranks.all_reduce)
        fisher = stat.matrix()
        fisher /= unit_of(fisher.diagonal())  # the scores' ranks do not depend on it, overflow does
        done = [
            self._sweep(part, fisher, pattern, each, ranks)
            for part, each in zip(parts, counts, strict=True)
        ]
        new, keep = torch.empty_like(w, dtype=dtype), torch.empty_like(w, dtype=torch.bool)
        for cut, (values, kept) in zip(cuts, done, strict=True):
            new[:, cut], keep[:, cut] = values.reshape_as(w[:, cut]), kept.reshape_as(w[:, cut])
        return new, keep

    def _sweep(
        self, w: Tensor, f: Tensor, pattern: Pattern, drop: list[int], ranks: Ranks
    ) -> tuple[Tensor, Tensor]:
        f = f[: w.shape[1], : w.shape[1]].to(w.device).clone()
        silent = f.diagonal() == 0  # no gradient ever: the first to go
        f.diagonal().add_(self.damp * f.diagonal().mean()).masked_fill_(silent, 1)
        choose, every = choice(pattern, w != 0, silent, drop, ranks.keep_all_but_lowest)
        return sweep_columns(w, upper_factor(f).to(w.dtype), choose, every)
