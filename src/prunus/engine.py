"""One pruning step: statistics -> proposals -> shares -> masks -> new weights -> commit.

Everything that can fail happens before the first weight is written, so a model is either pruned or
untouched.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from prunus import solvers
from prunus.allocators import Problem, Unit
from prunus.calibration import Calibration, measure_inputs
from prunus.distributed import (
    Shards,
    all_ranks,
    all_reduce_statistics,
    cut_along_inputs,
    shards_of,
)
from prunus.layers import Layer, reshard
from prunus.method import Candidate, Change, Choice, LayerRow, Method
from prunus.patterns import Pattern
from prunus.progress import track
from prunus.stats import Statistic


def present_sparsity(layers: Sequence[Layer], pattern: Pattern) -> float:
    """The share of the pattern's units that are zero already, over all ranks."""
    counts = torch.zeros(2, dtype=torch.float64)
    for layer in layers:
        w, dead = layer.local, 0
        if int(w.count_nonzero()) < w.numel():
            alive = pattern.pool(layer.matrix(w != 0))
            dead = (alive.numel() - int(alive.count_nonzero())) * w.numel() // alive.numel()
        counts += torch.tensor([dead, w.numel()])
    zeros, size = shards_of(layers, pattern).all_reduce(counts).tolist()
    return float(zeros / max(1, size))


def _check_loaded(layers: Sequence[Layer]) -> None:
    if absent := [layer.parameter_name for layer in layers if layer.weight.is_meta]:
        raise ValueError(f"{absent[0]} is on the meta device; load the weights first")


def check_reachable(layers: Sequence[Layer], pattern: Pattern, target: float) -> None:
    """Raises ValueError if more is pruned already than the target asks for."""
    _check_loaded(layers)
    present = present_sparsity(layers, pattern)
    size = sum(layer.weight.numel() for layer in layers)
    if present * size > target * size + 1:
        raise ValueError(
            f"sparsity is {present:.4f} already, above the target {target:g}; pruned weights do "
            f"not come back: raise the target to {present:.4f} or more"
        )


def measure(
    method: Method, layers: Sequence[Layer], model: nn.Module, calibration: Calibration | None
) -> dict[Layer, Statistic]:
    """The statistics the method needs, measured and summed over data-parallel ranks.

    Raises ValueError if it needs data and there is none, or a layer's inputs are sharded.
    """
    needed = {layer: method.pruner.statistic(layer) for layer in layers}
    stats = {layer: stat for layer, stat in needed.items() if stat is not None}
    if not stats:
        return {}
    if calibration is None:
        raise ValueError(
            f"pruner {method.pruner.name!r} learns from data; "
            "pass calibration=prunus.Calibration(batches, loss_fn)"
        )
    if cut := [layer.name for layer in stats if cut_along_inputs(layer)]:
        raise ValueError(
            f"{', '.join(cut[:3])}: sharded along the inputs, which {method.pruner.name!r} "
            "measures; exclude them, or use a pruner that needs no data"
        )
    with all_ranks().together():
        measure_inputs(model, stats, calibration)
    for stat in stats.values():
        all_reduce_statistics(stat.tensors())
    return stats


def _refuse(bad: Sequence[int], names: Sequence[str], shards: Shards, what: str) -> None:
    # every rank must raise, or the others would wait for it for ever
    counts = shards.all_reduce(torch.tensor(bad)).tolist()
    for name, count in zip(names, counts, strict=True):
        if count:
            raise ValueError(f"{name} has {count} NaN or infinite {what}; nothing was pruned")


def _candidate(method: Method, layer: Layer, stat: Statistic | None) -> Candidate:
    w = layer.matrix(layer.local)
    scores, rebuild = method.pruner.propose(w, stat, method.pattern)
    if scores.shape != w.shape:
        raise ValueError(
            f"pruner {method.pruner.name!r} gave scores of shape {tuple(scores.shape)} for "
            f"{layer.name}, which is {tuple(w.shape)}"
        )
    if int(w.count_nonzero()) == w.numel():
        units = method.pattern.pool(scores)
        return Candidate(layer, rebuild, units, 0, solvers.total(units))
    alive = w != 0
    units = method.pattern.pool(torch.where(alive, scores, 0))  # a copy: scores may be w itself
    total = solvers.total(units)
    dead = method.pattern.pool(alive).logical_not_()
    units.masked_fill_(dead, -math.inf)
    return Candidate(layer, rebuild, units, int(dead.count_nonzero()), total)


@torch.no_grad()
def propose(
    method: Method, layers: Sequence[Layer], stats: dict[Layer, Statistic], shards: Shards
) -> list[Candidate]:
    """Scores for every layer, computed from the present weights.

    Raises ValueError for weights or scores that are NaN or infinite.
    """
    _check_loaded(layers)
    names = [layer.parameter_name for layer in layers]
    bad = [solvers.count_non_finite(layer.local) for layer in layers]
    _refuse(bad, names, shards, "weights")
    bar = track(layers, f"{method.pruner.name}: scores")
    with shards.together():
        candidates = [_candidate(method, layer, stats.get(layer)) for layer in bar]
    bad = [
        0 if math.isfinite(c.total) else solvers.count_non_finite(c.scores) - c.pruned
        for c in candidates
    ]
    _refuse(bad, names, shards, f"{method.pruner.name} scores")
    dtype = functools.reduce(torch.promote_types, (c.scores.dtype for c in candidates))
    for candidate in candidates:
        candidate.scores = candidate.scores.to(dtype)
    return candidates


def _shares(
    method: Method, candidates: Sequence[Candidate], target: float | None, shards: Shards
) -> list[int]:
    """Units to drop in this rank's part of each layer."""
    scores = [c.scores for c in candidates]
    mine = torch.tensor([[c.scores.numel(), c.pruned] for c in candidates])
    sizes = shards.all_reduce(mine).tolist()
    units = [
        Unit(c.layer.name, c.layer.shape, *size) for c, size in zip(candidates, sizes, strict=True)
    ]

    def lowest(tensors: Sequence[Tensor], k: int) -> tuple[list[int], list[int]]:
        return solvers.count_lowest(
            tensors, k, shards.all_reduce if shards.group else None, shards.rank, shards.world_size
        )

    drop = method.allocator.allocate(Problem(units, target, lambda k: lowest(scores, k)[1])).drop
    if shards.group is None:
        return list(drop)
    if method.pattern.kind == "row":
        return _shares_of_rows(drop, [len(s) for s in scores], shards)
    return [lowest([s], d)[0][0] for s, d in zip(scores, drop, strict=True)]


def _shares_of_rows(drop: Sequence[int], rows: Sequence[int], shards: Shards) -> list[int]:
    """What falls to this rank's rows, where the first rows of the layer lose one more."""
    table = torch.zeros(shards.world_size, len(rows), dtype=torch.int64)
    table[shards.rank] = torch.tensor(rows)
    table = shards.all_reduce(table)
    all_rows, before = table.sum(0).tolist(), table[: shards.rank].sum(0).tolist()
    shares = []
    for units, mine, whole, above in zip(drop, rows, all_rows, before, strict=True):
        each, more = divmod(units, whole)
        shares.append(each * mine + min(max(more - above, 0), mine))
    return shares


@torch.no_grad()
def choose(
    method: Method, candidates: Sequence[Candidate], target: float | None, shards: Shards
) -> list[Choice]:
    """Masks that meet the target exactly (ignored where the pattern fixes the sparsity)."""
    pattern = method.pattern
    drop = [0] * len(candidates)
    if pattern.fixed is None:
        drop = _shares(method, candidates, target, shards)
    masks, counts = [], []
    for candidate, k in zip(candidates, drop, strict=True):
        mask = pattern.mask(candidate.scores, k)
        if candidate.pruned or pattern.kind == "block":
            mask &= candidate.layer.matrix(candidate.layer.local) != 0
        kept = solvers.total_kept(candidate.scores, pattern.pool(mask))
        zeros = mask.numel() - int(mask.count_nonzero())
        masks.append(mask)
        counts.append([mask.numel(), zeros, candidate.total, kept])
    whole = shards.all_reduce(torch.tensor(counts, dtype=torch.float64)).tolist()
    return [
        Choice(c.layer, c.rebuild, mask, _row(c.layer, pattern, *numbers))
        for c, mask, numbers in zip(candidates, masks, whole, strict=True)
    ]


def _row(
    layer: Layer, pattern: Pattern, size: float, zeros: float, before: float, after: float
) -> LayerRow:
    lost = max(0.0, 1 - after / before) if before else 0.0
    counts = int(size), int(zeros), layer.weight.element_size()
    return LayerRow(layer.name, layer.kind, layer.shape, str(pattern), *counts, lost)


def _change(choice: Choice) -> Change:
    layer, shape = choice.layer, tuple(choice.layer.local.shape)
    new = torch.where(choice.mask, choice.rebuild(choice.mask), 0).to(layer.local.dtype)
    mask = layer.unmatrix(choice.mask, shape)
    return Change(layer, layer.unmatrix(new, shape), mask, choice.row)


@torch.no_grad()
def rebuild(method: Method, choices: Sequence[Choice], shards: Shards) -> list[Change]:
    """The new weights, in the shape of the old.

    Raises ValueError if the pruner computed one that is NaN or infinite.
    """
    with shards.together():
        changes = [_change(choice) for choice in track(choices, f"{method.pruner.name}: weights")]
    names = [change.layer.parameter_name for change in changes]
    bad = [solvers.count_non_finite(change.weight) for change in changes]
    _refuse(bad, names, shards, f"new weights from {method.pruner.name}")
    return changes


def _pieces(change: Change) -> Iterator[tuple[Tensor, Tensor]]:
    """The weight in the model beside the one in the change, a few rows at a time."""
    w = change.layer.local
    rows = max(1, solvers.CHUNK * len(w) // max(1, w.numel()))
    yield from zip(torch.split(w, rows), torch.split(change.weight, rows), strict=True)


@torch.no_grad()
def commit(changes: Sequence[Change]) -> None:
    """Write the new weights; each change then holds the old one, so a second commit undoes it.

    All or nothing: an interrupt in the middle puts back what was written. Swaps piece by piece, so
    that no second copy of a weight is needed.
    """
    done: list[tuple[Tensor, Tensor]] = []
    begun: list[tuple[Tensor, Tensor]] = []
    try:
        for change in changes:
            for w, other in _pieces(change):
                begun = [(w, w.clone())]
                w.copy_(other)
                other.copy_(begun[0][1])
                done.append((w, other))
    except BaseException:
        for w, old in done + begun:
            w.copy_(old)
        raise


def prune_step(
    method: Method,
    layers: Sequence[Layer],
    target: float | None,
    model: nn.Module,
    calibration: Calibration | None,
) -> list[Change]:
    """One whole step, committed. ``layers`` come from `Method.fit`."""
    shards = shards_of(layers, method.pattern)
    stats = measure(method, layers, model, calibration)
    candidates = propose(method, layers, stats, shards)
    choices = choose(method, candidates, target, shards)
    del candidates  # the scores are as large as the weights
    changes = rebuild(method, choices, shards)
    reshard(model)  # an evaluation may have come before
    commit(changes)
    return changes
