"""How much each layer gives up, on however many ranks it lies, and the masks that follow."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prunus.allocators import Allocation, Allocator, Problem, Uniform, Unit
from prunus.calibration.memory_plan import Rows
from prunus.core.patterns import Pattern
from prunus.core.ranks import Ranks
from prunus.engine.method import LayerMask, LayerResult, LayerScores, Method
from prunus.solvers import selection

Lowest = Callable[[int], list[int]]


def allocate(
    method: Method,
    rows: Sequence[Rows],
    counts: Sequence[tuple[int, int]],
    target: float | None,
    shards: Ranks,
    lowest: Lowest | None = None,
) -> list[int]:
    """Units to be gone in each whole layer, from this rank's (units, dead units) of each."""
    sizes = shards.all_reduce(torch.tensor(list(counts))).tolist()
    if method.drop is not None:
        names = [part.layer.name for part in rows]
        return [max(method.drop[x], dead) for x, (_, dead) in zip(names, sizes, strict=True)]
    units = [
        Unit(part.layer.name, part.layer.shape, *size)
        for part, size in zip(rows, sizes, strict=True)
    ]
    problem = Problem(units, target, signals=method.signals)
    if lowest is not None:
        problem = replace(problem, lowest=lowest)
    return _checked(method.allocator, problem)


def _checked(allocator: Allocator, problem: Problem) -> list[int]:
    """Raises ValueError for an allocation that no masks can meet."""
    allocation, units = allocator.allocate(problem), problem.units
    who = f"allocator {allocator.name!r} ({type(allocator).__name__})"
    drops = list(allocation.drop) if isinstance(allocation, Allocation) else []
    if len(drops) != len(units):
        raise ValueError(f"{who} gave no prunus.Allocation of {len(units)} layers; see `filled`")
    for unit, drop in zip(units, drops, strict=True):
        whole = isinstance(drop, numbers.Integral) and not isinstance(drop, bool)
        if not whole or not unit.pruned <= drop <= unit.size:
            raise ValueError(
                f"{who} drops {drop!r} units of {unit.name}, where a whole number from "
                f"{unit.pruned} (zero already) to {unit.size} is needed; `prunus.filled` rounds "
                "and keeps within these bounds"
            )
    return [int(drop) for drop in drops]


def _drops(
    method: Method, candidates: Sequence[LayerScores], target: float | None, shards: Ranks
) -> list[int]:
    """Units to drop in this rank's part of each layer.

    Magnitudes in place of scores cannot be ranked among scores: such layers meet the target each
    by itself, where an allocator ranks.
    """
    apart = [i for i, c in enumerate(candidates) if c.unreached and method.allocator.ranks_scores]
    if not apart:
        return _local_drops(method, candidates, target, shards)
    drops = dict.fromkeys(range(len(candidates)), 0)
    alone = replace(method, allocator=Uniform())
    for part, places in ((method, drops.keys() - set(apart)), (alone, apart)):
        order = sorted(places)
        if order:
            some = _local_drops(part, [candidates[i] for i in order], target, shards)
            drops |= dict(zip(order, some, strict=True))
    return list(drops.values())


def _local_drops(
    method: Method, candidates: Sequence[LayerScores], target: float | None, shards: Ranks
) -> list[int]:
    """Units to drop in this rank's part of each layer."""
    scores = [c.scores for c in candidates]

    def lowest(tensors: Sequence[Tensor], k: int) -> tuple[list[int], list[int]]:
        return selection.count_lowest(
            tensors, k, shards.all_reduce if shards.group else None, shards.rank, shards.world_size
        )

    drop = allocate(
        method,
        [c.rows for c in candidates],
        [(c.scores.numel(), c.pruned) for c in candidates],
        target,
        shards,
        lambda k: lowest(scores, k)[1],
    )
    if shards.group is None:
        return drop
    if method.pattern.kind == "row":
        return drops_of_rows(drop, [len(s) for s in scores], shards)
    return [lowest([s], d)[0][0] for s, d in zip(scores, drop, strict=True)]


def drops_of_rows(drop: Sequence[int], rows: Sequence[int], shards: Ranks) -> list[int]:
    """What falls to this rank's rows, where the first rows of the layer lose one more."""
    table = torch.zeros(shards.world_size, len(rows), dtype=torch.int64)
    table[shards.rank] = torch.tensor(rows)
    table = shards.all_reduce(table)
    all_rows, before = table.sum(0).tolist(), table[: shards.rank].sum(0).tolist()
    shares = []
    for units, local_rows, whole, above in zip(drop, rows, all_rows, before, strict=True):
        each, more = divmod(units, whole)
        shares.append(each * local_rows + min(max(more - above, 0), local_rows))
    return shares


@torch.no_grad()
def select_masks(
    method: Method, candidates: Sequence[LayerScores], target: float | None, shards: Ranks
) -> list[LayerMask]:
    """Masks that meet the target exactly (ignored where the pattern fixes the sparsity)."""
    pattern = method.pattern
    drop = [0] * len(candidates)
    if pattern.fixed is None and candidates:
        drop = _drops(method, candidates, target, shards)
    masks, counts = [], []
    for candidate, k in zip(candidates, drop, strict=True):
        mask = pattern.mask(candidate.scores, k)
        if candidate.pruned or pattern.kind == "block":
            mask &= candidate.rows.matrix() != 0
        kept = selection.total_kept(candidate.scores, pattern.pool(mask))
        zeros = mask.numel() - int(mask.count_nonzero())
        masks.append(mask)
        counts.append([mask.numel(), zeros, candidate.total, kept])
    whole = shards.all_reduce(torch.tensor(counts, dtype=torch.float64)).tolist()
    rows = [layer_row(c.rows, pattern, *n) for c, n in zip(candidates, whole, strict=True)]
    return [
        LayerMask(c.rows, mask, _by_magnitude(row) if c.unreached else row)
        for c, mask, row in zip(candidates, masks, rows, strict=True)
    ]


def _by_magnitude(row: LayerResult) -> LayerResult:
    return replace(row, unreached="magnitude", score_lost=None)


def layer_row(
    rows: Rows,
    pattern: Pattern | str,
    size: float,
    zeros: float,
    before: float | None = None,
    after: float = 0.0,
) -> LayerResult:
    lost = None if before is None else max(0.0, 1 - after / before) if before else 0.0
    layer = rows.layer
    counts = int(size), int(zeros), layer.weight.element_size()
    return LayerResult(layer.name, layer.kind, layer.shape, str(pattern), *counts, lost)
