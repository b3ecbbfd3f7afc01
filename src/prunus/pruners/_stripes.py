"""How many weights each stripe of columns loses in a column sweep, and which."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from prunus.core.patterns import NM, Pattern
from prunus.solvers.column_sweep import STRIPE, Choose
from prunus.solvers.column_sweep_numpy import Groups
from prunus.solvers.selection import keep_all_but_lowest_of_each

KeepAllButLowest = Callable[[Tensor, int], Tensor]


def stripe_counts(
    parts: Sequence[Tensor], drop: int, all_reduce: Callable[[Tensor], Tensor]
) -> list[list[int]]:
    """How many weights of each `STRIPE` columns are to be gone, `drop` in all, zeros included.

    What goes anew is shared in proportion to what is there. ``parts`` are (rows, cols) matrices
    that are swept one by one; ``all_reduce`` sums over the ranks that hold other rows of them.
    """
    stripes = [torch.split(part, STRIPE, dim=1) for part in parts]
    flat = [stripe for each in stripes for stripe in each]
    counts = torch.tensor([[s.numel(), int(s.count_nonzero())] for s in flat])
    sizes, alive = all_reduce(counts).T
    fresh = drop - int((sizes - alive).sum())
    ends = alive.cumsum(0) * fresh // max(1, int(alive.sum()))
    each_drop = (sizes - alive) + ends.diff(prepend=torch.zeros(1, dtype=torch.int64))
    return [part.tolist() for part in torch.split(each_drop, [len(each) for each in stripes])]


def row_counts(w: Tensor, drop: int) -> list[Tensor]:
    """For each `STRIPE` columns, how many weights each row is to be without, zeros included.

    ``w`` is (rows, cols). Every row loses the same of `drop`, the first ones one more where that
    does not divide; what goes anew is shared in proportion to what is there.
    """
    each, more = divmod(drop, max(1, len(w)))
    alive = torch.stack([part.count_nonzero(1) for part in torch.split(w, STRIPE, dim=1)], 1)
    sizes = torch.tensor([part.shape[1] for part in torch.split(w, STRIPE, dim=1)])
    dead = sizes.to(w.device) - alive
    target = each + (torch.arange(len(w), device=w.device) < more).long()
    fresh = (target - dead.sum(1)).clamp(min=0).unsqueeze(1)
    ends = alive.cumsum(1) * fresh // alive.sum(1, keepdim=True).clamp(min=1)
    return list((dead + ends.diff(dim=1, prepend=torch.zeros_like(ends[:, :1]))).T)


def choice(
    pattern: Pattern,
    alive: Tensor,
    useless: Tensor,
    counts: Sequence[int] | Sequence[Tensor],
    keep_all_but_lowest: KeepAllButLowest,
) -> tuple[Choose, int]:
    """How `sweep` chooses masks of a pattern, and every how many columns.

    ``alive`` is (rows, cols): what was pruned before stays so; ``useless`` (cols,) go first;
    ``counts`` are those of `stripe_counts` or, for `row`, of `row_counts`; not used for N:M.
    """

    if isinstance(pattern, NM):
        return Groups(pattern.n, pattern.m, alive, useless), pattern.m
    plain = bool(alive.all()) and not bool(useless.any())

    def keep(scores: Tensor, begin: int) -> Tensor:
        count = counts[begin // STRIPE]
        if isinstance(count, Tensor):
            return keep_all_but_lowest_of_each(scores, count)
        return keep_all_but_lowest(scores, count)

    def choose(scores: Tensor, begin: int, end: int) -> Tensor:
        if plain:
            return keep(scores, begin)
        here = alive[:, begin:end]
        return keep(scores.masked_fill(useless[begin:end], 0).masked_fill(~here, -1), begin) & here

    return choose, STRIPE
