"""Relative importance, and relative importance and activations.

Y. Zhang, H. Bai, H. Lin, J. Zhao, L. Hou, C. V. Cannistraci, "Plug-and-play: an efficient
post-training pruning method for large language models", 2024,
https://openreview.net/forum?id=Tr0lPx9woF, eq. 3 and 4.

Here a column or row of zeros scores zero, where the division would give NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from prunus.core.layers import Layer, working_precision
from prunus.core.patterns import Pattern
from prunus.core.ranks import Ranks
from prunus.pruners._layerwise import InputStatistic, Layerwise
from prunus.pruners.base import register_pruner


def relative_importance(w: Tensor, ranks: Ranks) -> Tensor:
    """``|w_ij| / sum_i |w_ij| + |w_ij| / sum_j |w_ij|`` of a (rows, cols) matrix."""
    size = working_precision(w).abs()
    columns, rows = ranks.all_reduce(size.sum(0)), size.sum(1, keepdim=True)
    shares = (
        columns.masked_fill(columns == 0, math.inf).reciprocal()
        + rows.masked_fill(rows == 0, math.inf).reciprocal()
    )
    return size.mul_(shares)


@register_pruner
@dataclass(frozen=True)
class RI(Layerwise):
    """Remove the weights that matter least to their input and their output: no data needed.

    Score ``|w_ij| / sum_i |w_ij| + |w_ij| / sum_j |w_ij|``, so that no channel is emptied.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> prunus.prune(model, prunus.RI(), sparsity=0.5).sparsity
    0.5
    """

    name: ClassVar[str] = "ri"

    def statistic(self, layer: Layer) -> InputStatistic | None:
        return super().statistic(layer) if self.swap or self.refit else None

    def scores(self, w: Tensor, stat: Any, pattern: Pattern, ranks: Ranks) -> Tensor:
        return relative_importance(w, ranks)


@register_pruner
@dataclass(frozen=True)
class RIA(Layerwise):
    """Relative importance times the norms of the inputs: score ``RI_ij ||X_j||^a``.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> data = prunus.Calibration([torch.randn(16, 8)])
    >>> prunus.prune(model, prunus.RIA(a=0.5), sparsity=0.5, calibration=data).sparsity
    0.5
    """

    name: ClassVar[str] = "ria"

    a: float = 0.5
    """exponent of the norm; at 0 the score is that of `ri`"""

    def __post_init__(self) -> None:
        if not 0 <= self.a < math.inf:
            raise ValueError(f"a={self.a}; an exponent of 0 or more is needed, such as 0.5")

    def scores(self, w: Tensor, stat: InputStatistic, pattern: Pattern, ranks: Ranks) -> Tensor:
        return relative_importance(w, ranks).mul_(stat.norm.to(w.device) ** self.a)
