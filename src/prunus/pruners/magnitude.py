"""Magnitude pruning.

S. Han, J. Pool, J. Tran, W. Dally, "Learning both weights and connections for efficient neural
networks", 2015, https://arxiv.org/abs/1506.02626; gradual, with a cubic schedule, in M. Zhu and
S. Gupta, "To prune, or not to prune", 2017, https://arxiv.org/abs/1710.01878.

Here a ranking removes an exact count: a threshold alone would prune every weight that ties.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prunus.core.patterns import Pattern
from prunus.core.ranks import Ranks
from prunus.pruners.base import KINDS, ScorePruner, register_pruner
from prunus.stats import Statistic


@register_pruner
@dataclass(frozen=True)
class Magnitude(ScorePruner):
    """Remove the weights of the smallest absolute value: score ``|w|``; survivors stay.

    Needs no data. With blocks, the score of a block is the sum of its ``|w|``.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> prunus.prune(model, prunus.Magnitude(), sparsity=0.5).sparsity
    0.5
    """

    name: ClassVar[str] = "magnitude"
    patterns: ClassVar[tuple[str, ...]] = KINDS
    allocator: ClassVar[str] = "global"

    def scores(self, w: Tensor, stat: Statistic | None, pattern: Pattern, ranks: Ranks) -> Tensor:
        return w.abs()
