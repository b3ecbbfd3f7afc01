"""From statistics to new weights: all of a pruning step between its plan and its commit."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from prunus.calibration.calibration import Calibration
from prunus.calibration.measurements import Measurements, check_measurable, measurements
from prunus.calibration.memory_plan import Rows
from prunus.core.layers import Layer
from prunus.core.patterns import Block
from prunus.core.progress import track
from prunus.core.ranks import Ranks
from prunus.core.sharding import shards_of
from prunus.engine.checked_calls import rebuilt, refined, scores_of
from prunus.engine.method import LayerMask, LayerResult, LayerScores, LayerUpdate, Method
from prunus.engine.unreached import magnitudes, solvable, statistics, with_unchanged
from prunus.pruners import ScorePruner
from prunus.solvers import selection
from prunus.solvers.least_squares import layer_error
from prunus.stats import Statistic

log = logging.getLogger("prunus")


def no_autocast(shares: Sequence[Rows]) -> torch.autocast:
    """Solving is exact, also for those who step the optimizer inside `torch.autocast`."""
    return torch.autocast(shares[0].layer.local.device.type, enabled=False)


def check_loaded(layers: Sequence[Layer]) -> None:
    """Raises ValueError for weights on the meta device."""
    if absent := [layer.parameter_name for layer in layers if layer.weight.is_meta]:
        raise ValueError(f"{absent[0]} is on the meta device; load the weights first")


def plan_measurements(
    method: Method,
    layers: Sequence[Layer],
    model: nn.Module,
    calibration: Calibration | None,
    begin: int = 0,
) -> Measurements:
    """What will be measured in how many passes over the data; `begin` batches are passed over."""
    unit = method.pattern.rows if isinstance(method.pattern, Block) else 1
    return measurements(method.pruner.statistic, layers, model, calibration, unit, begin)


def measure(
    method: Method,
    layers: Sequence[Layer],
    model: nn.Module,
    calibration: Calibration | None,
    begin: int = 0,
) -> tuple[Measurements, Ranks]:
    """The measurements, and the ranks among which the rows lie or are dealt out.

    Raises ValueError, before anything long begins, for what cannot be measured or pruned.
    """
    check_loaded(layers)
    measured = plan_measurements(method, layers, model, calibration, begin)
    check_measurable(measured.stats, f"pruner {method.pruner.name!r}", calibration)
    shards = shards_of(layers, method.pattern)
    names = [layer.parameter_name for layer in layers]
    bad = [selection.count_non_finite(layer.local) for layer in layers]
    refuse_non_finite(bad, names, shards, "weights")
    if shards.group is None:
        shards = measured.everyone
    if len(measured.groups) > 1:
        log.info(
            "the statistics do not fit the memory together; %d groups of layers are measured one "
            "after the other, each with a pass over the calibration data",
            len(measured.groups),
        )
    return measured, shards


def refuse_non_finite(bad: Sequence[int], names: Sequence[str], shards: Ranks, what: str) -> None:
    # every rank must raise, or the others would wait for it for ever
    counts = shards.all_reduce(torch.tensor(bad)).tolist()
    for name, count in zip(names, counts, strict=True):
        if count:
            raise ValueError(f"{name} has {count} NaN or infinite {what}; nothing was pruned")


def _assembled(shares: Sequence[Rows], parts: Mapping[Rows, Tensor]) -> list[Tensor]:
    """For each share the rows that were computed in pieces."""
    whole = []
    for share in shares:
        local_parts = [part for rows, part in parts.items() if rows.layer is share.layer]
        whole.append(local_parts[0] if len(local_parts) == 1 else torch.cat(local_parts))
    return whole


def candidate_of(method: Method, rows: Rows, scores: Tensor) -> LayerScores:
    w = rows.matrix()
    if int(w.count_nonzero()) == w.numel():
        units = method.pattern.pool(scores)
        return LayerScores(rows, units, 0, selection.total(units))
    alive = w != 0
    units = method.pattern.pool(torch.where(alive, scores, 0))  # a copy: scores may be w itself
    total = selection.total(units)
    dead = method.pattern.pool(alive).logical_not_()
    units.masked_fill_(dead, -math.inf)
    return LayerScores(rows, units, int(dead.count_nonzero()), total)


def _scores(
    method: Method, measured: Measurements, rows: Rows, stat: Statistic | None, shards: Ranks
) -> Tensor:
    assert isinstance(method.pruner, ScorePruner)
    if rows.layer in measured.unreached:
        return magnitudes(rows)
    return scores_of(method.pruner, rows, stat, method.pattern, shards)


@torch.no_grad()
def score(method: Method, measured: Measurements, shards: Ranks) -> list[LayerScores]:
    """Scores for every layer, computed from the present weights.

    Raises ValueError for scores that are NaN or infinite.
    """
    assert isinstance(method.pruner, ScorePruner)
    parts: dict[Rows, Tensor] = {}
    for i, group in enumerate(measured.groups):
        stats = statistics(method, measured, i)
        with shards.raise_on_all_ranks(), no_autocast(measured.shares):
            for rows in track(group, f"{method.pruner.name}: scores"):
                parts[rows] = _scores(method, measured, rows, stats.get(rows), shards)
        del stats  # or the next group would be measured beside this one
    shares = solvable(method, measured)
    whole = _assembled(shares, parts)
    del parts
    candidates = [candidate_of(method, rows, s) for rows, s in zip(shares, whole, strict=True)]
    for candidate in candidates:
        candidate.unreached = candidate.rows.layer in measured.unreached
    bad = [
        0 if math.isfinite(c.total) else selection.count_non_finite(c.scores) - c.pruned
        for c in candidates
    ]
    names = [c.rows.layer.parameter_name for c in candidates]
    refuse_non_finite(bad, names, shards, f"{method.pruner.name} scores")
    dtypes = [candidate.scores.dtype for candidate in candidates]
    for candidate in candidates:
        candidate.scores = candidate.scores.to(functools.reduce(torch.promote_types, dtypes))
    return candidates


def change_of(
    rows: Rows, new: Tensor, mask: Tensor, measured: Measurements, row: LayerResult
) -> LayerUpdate:
    """A change of all rows that the weight has on this rank."""
    layer, shape = rows.layer, tuple(rows.layer.local.shape)
    new = torch.where(mask, new, 0).to(layer.local.dtype)
    if measured.everyone.group is not None:
        new, mask = measured.gathered(rows, new), measured.gathered(rows, mask)
    return LayerUpdate(layer, layer.unmatrix(new, shape), layer.unmatrix(mask, shape), row)


def with_error(
    row: LayerResult, w: Tensor, new: Tensor, mask: Tensor, stat: Statistic | None, shards: Ranks
) -> LayerResult:
    """The row with the error of the layer's outputs, where the statistic can tell it."""
    gram = None if stat is None else stat.gram(w.device)
    if gram is None:
        return row
    errors = torch.zeros(2, dtype=torch.float64)
    rows = max(1, selection.CHUNK // max(1, w.shape[1]))
    for parts in zip(*(torch.split(t, rows) for t in (w, new, mask)), strict=True):
        dense, kept = parts[0].to(gram.dtype), torch.where(parts[2], parts[1], 0).to(gram.dtype)
        for i, t in enumerate((kept, torch.zeros_like(dense))):
            errors[i] += layer_error(dense, t, gram).sum().cpu()
    error, whole = shards.all_reduce(errors).tolist()
    return replace(row, error=error / whole if whole > 0 else 0.0)


def _rebuilt(
    method: Method, rows: Rows, stat: Statistic | None, choice: LayerMask, shards: Ranks
) -> Tensor:
    """The new weights of some rows; the choice's mask may get better on the way."""
    pruner, begin = method.pruner, choice.rows.begin
    assert isinstance(pruner, ScorePruner)
    if choice.row.unreached:
        return rows.matrix()
    mask = choice.mask[rows.begin - begin : rows.end - begin]
    mask.copy_(refined(pruner, rows, stat, mask, method.pattern))
    new = rebuilt(pruner, rows, stat, mask)
    choice.row = with_error(choice.row, rows.matrix(), new, mask, stat, shards)
    return new


@torch.no_grad()
def rebuild(
    method: Method, measured: Measurements, choices: Sequence[LayerMask], shards: Ranks
) -> list[LayerUpdate]:
    """The new weights, in the shape of the old.

    Goes through the groups of statistics backwards, because the last one is still there. Raises
    ValueError if the pruner computed a weight that is NaN or infinite.
    """
    assert isinstance(method.pruner, ScorePruner)
    masks = {choice.rows.layer: choice for choice in choices}
    parts: dict[Rows, Tensor] = {}
    for i in reversed(range(len(measured.groups))):
        stats = measured[i]
        group = [rows for rows in measured.groups[i] if rows.layer in masks]
        with shards.raise_on_all_ranks(), no_autocast(measured.shares):
            for rows in track(group, f"{method.pruner.name}: weights"):
                part = stats.get(rows), masks[rows.layer]
                parts[rows] = _rebuilt(method, rows, *part, shards)
                del part
        del stats  # or the next group would be measured beside this one
    ordered = dict(sorted(parts.items(), key=lambda item: item[0].begin))
    whole = _assembled([choice.rows for choice in choices], ordered)
    changes = [
        change_of(c.rows, new, c.mask, measured, c.row)
        for c, new in zip(choices, whole, strict=True)
    ]
    return checked(method, with_unchanged(method, measured, changes, shards), shards)


def checked(method: Method, changes: list[LayerUpdate], shards: Ranks) -> list[LayerUpdate]:
    names = [change.layer.parameter_name for change in changes]
    bad = [selection.count_non_finite(change.weight) for change in changes]
    refuse_non_finite(bad, names, shards, f"new weights from {method.pruner.name}")
    return changes
