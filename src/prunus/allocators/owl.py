"""Outlier weighed layerwise sparsity.

L. Yin et al., "Outlier weighed layerwise sparsity (OWL): a missing secret sauce for pruning LLMs to
high sparsity", 2023, https://arxiv.org/abs/2310.05175, section 3.2.

Here the total is met exactly, whatever the sizes of the layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prunus.allocators.base import (
    Allocation,
    Problem,
    SignalAllocator,
    filled,
    places,
    register_allocator,
)
from prunus.core.layers import Layer
from prunus.stats import InputNorm


@register_allocator
@dataclass(frozen=True)
class OWL(SignalAllocator):
    """Blocks with more outliers among ``|w_ij| ||X_j||`` stay denser, by up to about `spread`.

    An outlier is more than `outlier` times the block's mean.
    """

    name: ClassVar[str] = "owl"

    outlier: float = 5.0
    """how many times the mean an outlier is, at least (M)"""
    spread: float = 0.08
    """how far a block's sparsity may be from the target (lambda)"""

    def __post_init__(self) -> None:
        if self.outlier <= 0 or not 0 <= self.spread < 1:
            raise ValueError(
                f"outlier={self.outlier}, spread={self.spread}; use an outlier above 0, and a "
                "spread within [0, 1)"
            )

    def statistic(self, layer: Layer) -> InputNorm:
        return InputNorm(layer.matrix_shape()[1])

    def signal(self, block: Sequence[tuple[Tensor, InputNorm]]) -> float:
        """Share of outliers in the block."""
        scores = [w.abs().float() * stat.norm.to(w.device) for w, stat in block]
        size = sum(score.numel() for score in scores)
        mean = sum(float(score.sum()) for score in scores) / size
        return sum(int((score > self.outlier * mean).sum()) for score in scores) / size

    def allocate(self, problem: Problem) -> Allocation:
        size, target = max(1, problem.size), problem.drop / max(1, problem.size)
        denser = [self.spread * (2 * place - 1) for place in places(problem)]
        mean = sum(u.size * d for u, d in zip(problem.units, denser, strict=True)) / size
        return filled(problem, [min(max(target - d + mean, 0), 1) for d in denser])
