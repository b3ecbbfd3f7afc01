"""SparseGPT: a sweep over the columns that passes each column's error on to the next ones.

E. Frantar and D. Alistarh, "SparseGPT: massive language models can be accurately pruned in
one-shot", 2023, https://arxiv.org/abs/2301.00774, algorithm 1.

Here the factor comes from one factorization, several columns are solved at once, layers with the
same inputs share both, and a failing factorization is never replaced by an identity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prunus.core.layers import Layer, working_precision
from prunus.core.patterns import Pattern
from prunus.core.ranks import Ranks
from prunus.pruners._layerwise import gram_of
from prunus.pruners._stripes import choice, row_counts, stripe_counts
from prunus.pruners.base import JointPruner, register_pruner
from prunus.solvers.column_sweep import sweep_columns
from prunus.solvers.least_squares import refit, ridge_of
from prunus.stats import InputGram


@register_pruner
@dataclass(frozen=True)
class SparseGPT(JointPruner):
    """Sweep over the columns with ``H = 2/n X X^T``: score ``w^2 / U_jj^2`` with ``U^T U = H^-1``.

    The mask of 128 columns (for N:M of each M) is chosen when the sweep gets there; the error of
    what goes is made up for in the columns to the right.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> data = prunus.Calibration([torch.randn(16, 8)])
    >>> prunus.prune(model, prunus.SparseGPT(), sparsity=0.5, calibration=data).sparsity
    0.5
    """

    name: ClassVar[str] = "sparsegpt"
    patterns: ClassVar[tuple[str, ...]] = ("unstructured", "row", "N:M")

    damp: float = 1e-2
    """added to the diagonal of H, relative to its mean"""
    refit: bool = False
    """afterwards solve for the weights that stay, by conjugate gradients"""
    device: str | None = None
    """where the Gram matrix of the inputs is stored; default: where the inputs are"""

    def __post_init__(self) -> None:
        if not 0 < self.damp < math.inf:
            raise ValueError(f"damp={self.damp}; a number above 0 is needed, such as 1e-2")

    def statistic(self, layer: Layer) -> InputGram:
        return gram_of(layer, self.device)

    def solve(
        self, w: Tensor, stat: InputGram, pattern: Pattern, drop: int, ranks: Ranks
    ) -> tuple[Tensor, Tensor]:
        dense, gram = working_precision(w), stat.gram(w.device)
        dead = gram.diagonal() == 0
        counts: Sequence[int] | Sequence[Tensor] = []
        if pattern.kind == "row":
            counts = row_counts(w, drop)
        elif pattern.fixed is None:
            counts = stripe_counts([w], drop, ranks.all_reduce)[0]
        choose, every = choice(pattern, w != 0, dead, counts, ranks.keep_all_but_lowest)
        new, mask = sweep_columns(
            dense, stat.factor(self.damp, w.device).to(dense.dtype), choose, every
        )
        if self.refit:
            ridge = ridge_of(stat.count, len(gram))
            new = refit(dense, new, gram.to(dense.dtype), mask, ridge=ridge)
        return new, mask
