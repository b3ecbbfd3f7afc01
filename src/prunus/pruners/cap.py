"""CAP, the correlation-aware pruner.

D. Kuznedelev, E. Kurtic, E. Frantar, D. Alistarh, "CAP: correlation-aware pruning for
highly-accurate sparse vision models", 2023, https://arxiv.org/abs/2210.09223, algorithm 1.

Two things are done otherwise. Blocks are ranked against each other by how much a weight adds to
the loss of its block, where the paper takes that loss as it is by then, which favors pruning where
blocks are short (``score="loss"`` does as the paper). And only these scores are kept along the
elimination, not a copy of the weights after each step: for any mask, one group solve gives the
weights that the elimination would have ended with, exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from prunus.core.names import did_you_mean
from prunus.core.patterns import NM, Pattern
from prunus.core.ranks import Ranks
from prunus.pruners._second_order import SecondOrder
from prunus.pruners.base import ScorePruner, register_pruner
from prunus.solvers.obs import greedy_losses, greedy_losses_of_groups, group_solve, increases
from prunus.stats.block_fisher import BlockFisher

SCORES: dict[str, Callable[[Tensor], Tensor]] = {"increase": increases, "loss": lambda x: x}


@register_pruner
@dataclass(frozen=True)
class CAP(SecondOrder, ScorePruner):
    """Eliminate weights one by one, the others adjusting; score: what each adds to the loss.

    In each block the next to go is ``argmin w_p^2 / [F^-1]_pp``, with w and F^-1 as the weights
    gone so far have left them. What stays is ``w - F^-1[:, P] (F^-1_PP)^-1 w_P``.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> batches = [(torch.randn(4, 8), torch.randn(4, 2)) for _ in range(4)]
    >>> data = prunus.Calibration(batches, nn.functional.mse_loss)
    >>> pruner = prunus.CAP(block_size=4, damp=1e-4)
    >>> prunus.prune(model, pruner, sparsity=0.5, calibration=data).sparsity
    0.5
    """

    name: ClassVar[str] = "cap"
    patterns: ClassVar[tuple[str, ...]] = ("unstructured", "row", "N:M")
    allocator: ClassVar[str] = "global"

    score: Literal["increase", "loss"] = "increase"
    """what blocks are ranked by: the increase of the block's loss, or, as published, the loss"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score not in SCORES:
            near = did_you_mean(self.score, SCORES)
            raise ValueError(f"unknown score {self.score!r}{near}")

    def scores(self, w: Tensor, stat: BlockFisher, pattern: Pattern, ranks: Ranks) -> Tensor:
        if not isinstance(pattern, NM):
            score = SCORES[self.score]
            return stat.per_block(lambda f, x: score(greedy_losses(f.inverse(), x.double())), w)
        n, m = pattern.n, pattern.m
        return stat.per_block(
            lambda f, x: greedy_losses_of_groups(f.inverse(), x.double(), n, m), w
        )

    def rebuild(self, w: Tensor, stat: BlockFisher, mask: Tensor) -> Tensor:
        return stat.per_block(lambda f, x, keep: group_solve(f.fisher(), x.double(), keep), w, mask)
