"""CAP, the correlation-aware pruner.

D. Kuznedelev, E. Kurtic, E. Frantar, D. Alistarh, "CAP: correlation-aware pruning for
highly-accurate sparse vision models", 2023, https://arxiv.org/abs/2210.09223, algorithm 1.

Here only the losses along the elimination are kept, not a copy of the weights after each step: for
any mask, one group solve gives the weights that the elimination would have ended with, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prunus.elimination import greedy_losses, greedy_losses_of_groups, group_solve
from prunus.patterns import NM, Pattern
from prunus.pruners.base import Ranks, register_pruner
from prunus.pruners.second_order import SecondOrder
from prunus.stats.fisher import BlockFisher


@register_pruner
@dataclass(frozen=True)
class CAP(SecondOrder):
    """Eliminate weights one by one, the others adjusting; score: the block's loss by then.

    In each block the next to go is ``argmin w_p^2 / [F^-1]_pp``, with w and F^-1 as the weights
    gone so far have left them. What stays is ``w - F^-1[:, P] (F^-1_PP)^-1 w_P``.
    """

    name: ClassVar[str] = "cap"
    patterns: ClassVar[tuple[str, ...]] = ("unstructured", "row", "N:M")
    allocator: ClassVar[str] = "global"

    def scores(self, w: Tensor, stat: BlockFisher, pattern: Pattern, ranks: Ranks) -> Tensor:
        if not isinstance(pattern, NM):
            return stat.per_block(lambda f, x: greedy_losses(f.inverse(), x.double()), w)
        n, m = pattern.n, pattern.m
        return stat.per_block(
            lambda f, x: greedy_losses_of_groups(f.inverse(), x.double(), n, m), w
        )

    def rebuild(self, w: Tensor, stat: BlockFisher, mask: Tensor) -> Tensor:
        return stat.per_block(lambda f, x, keep: group_solve(f.fisher(), x.double(), keep), w, mask)
