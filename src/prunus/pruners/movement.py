"""Movement pruning: remove the weights that training moves towards zero.

V. Sanh, T. Wolf, A. Rush, "Movement pruning: adaptive sparsity by fine-tuning", 2020,
https://arxiv.org/abs/2005.07683, eq. 5.

Here pruned weights stay pruned. In the paper their scores go on through a straight-through
gradient, and they may come back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prunus.core.patterns import Pattern
from prunus.core.ranks import Ranks
from prunus.pruners.base import ScorePruner
from prunus.stats.movement import MovementSum


@dataclass(frozen=True)
class Movement(ScorePruner):
    """Score ``-sum_t w_t g_t`` over the steps of training: what grows stays; survivors stay as they
    are.

    The recipe entry ``movement`` sums up the scores. No calibration data shows them, so recipes
    and `prune` cannot name this pruner.
    """

    name: ClassVar[str] = "movement"

    def scores(self, w: Tensor, stat: MovementSum, pattern: Pattern, ranks: Ranks) -> Tensor:
        return stat.total
