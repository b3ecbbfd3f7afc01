"""ALPS: masks and weights found together by operator splitting.

X. Meng, K. Behdin, H. Wang, R. Mazumder, "ALPS: improved optimization for highly sparse one-shot
pruning for large language models", 2024, https://arxiv.org/abs/2406.07831, algorithm 1.

Here every pattern is a projection, and the solution is never worse than that of Wanda's mask. Where
rows lie on several ranks, each keeps as many weights as Wanda's scores give it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prunus.core.layers import Layer, working_precision
from prunus.core.patterns import Pattern
from prunus.core.ranks import Ranks
from prunus.pruners._layerwise import gram_of
from prunus.pruners.base import JointPruner, register_pruner
from prunus.solvers.admm import solve
from prunus.solvers.least_squares import ridge_of
from prunus.stats import InputGram


@register_pruner
@dataclass(frozen=True)
class ALPS(JointPruner):
    """Minimize ``||(w_new - w) X||`` over weights and masks at once, by ADMM; then refit.

    The strongest of the layerwise methods, and the slowest.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> data = prunus.Calibration([torch.randn(16, 8)])
    >>> prunus.prune(model, prunus.ALPS(iterations=50), sparsity=0.5, calibration=data).sparsity
    0.5
    """

    name: ClassVar[str] = "alps"
    patterns: ClassVar[tuple[str, ...]] = ("unstructured", "row", "N:M")

    iterations: int = 300
    """of ADMM, at most; it ends when the mask stands still"""
    damp: float = 1e-2
    """added to the diagonal of the Gram matrix while masks are sought, relative to its mean"""
    device: str | None = None
    """where the Gram matrix of the inputs is stored; default: where the inputs are"""

    def __post_init__(self) -> None:
        if self.iterations < 1 or not 0 < self.damp < math.inf:
            raise ValueError(
                f"iterations={self.iterations}, damp={self.damp}; use at least 1 iteration, and a "
                "damp above 0"
            )

    def statistic(self, layer: Layer) -> InputGram:
        return gram_of(layer, self.device)

    def solve(
        self, w: Tensor, stat: InputGram, pattern: Pattern, drop: int, ranks: Ranks
    ) -> tuple[Tensor, Tensor]:
        dense, alive = working_precision(w), w != 0
        gram = stat.gram(w.device).to(dense.dtype)
        if pattern.kind == "unstructured":
            first = dense.square().mul_(gram.diagonal()).masked_fill_(~alive, -1)
            keep = ranks.keep_all_but_lowest(first, drop)
            drop = keep.numel() - int(keep.count_nonzero())

        def project(scores: Tensor) -> Tensor:
            return pattern.mask(scores.masked_fill(~alive, -1), drop) & alive

        ridge = ridge_of(stat.count, len(gram))
        return solve(dense, gram, project, self.iterations, self.damp, ridge)
