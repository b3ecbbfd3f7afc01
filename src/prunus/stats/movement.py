"""What movement pruning measures: where training moves each weight.

V. Sanh, T. Wolf, A. Rush, "Movement pruning: adaptive sparsity by fine-tuning", 2020,
https://arxiv.org/abs/2005.07683, eq. 5.
"""

from __future__ import annotations

from torch import Tensor

from prunus.stats.base import Statistic


class MovementSum(Statistic):
    """``-sum_t w_t g_t`` of each weight, filled by the steps of training and not by a pass."""

    def __init__(self, total: Tensor) -> None:
        self.total = total
        """(rows, columns)"""

    def update(self, t: Tensor) -> None:
        """Take in ``w * g`` of a step, (rows, columns)."""
        self.total.sub_(t)

    def tensors(self) -> list[Tensor]:
        return [self.total]
