"""The new weights of methods that choose their masks while they solve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from prunus.calibration.measurements import Measurements
from prunus.calibration.memory_plan import Rows
from prunus.core.layers import Layer
from prunus.core.progress import track
from prunus.core.ranks import Ranks
from prunus.engine.allocation import allocate, drops_of_rows, layer_row, select_masks
from prunus.engine.checked_calls import solved
from prunus.engine.layer_solve import candidate_of, change_of, checked, no_autocast, with_error
from prunus.engine.method import LayerUpdate, Method
from prunus.engine.unreached import magnitudes, solvable, statistics, with_unchanged
from prunus.pruners import JointPruner
from prunus.stats import Statistic


def _largest_first(group: Sequence[Rows], stats: Mapping[Rows, Statistic]) -> list[Rows]:
    """In an order that solves what takes most memory before there are new weights to hold."""
    sizes = {rows: stats[rows].nbytes if rows in stats else 0 for rows in group}
    return sorted(group, key=lambda rows: -sizes[rows])


def _drops(
    method: Method, measured: Measurements, target: float | None, shards: Ranks
) -> dict[Layer, int]:
    """Units to be gone in each whole layer, but for those that stay as they are.

    Which these are is known once all groups are measured; several groups are then measured twice.
    """
    if method.pattern.fixed is None and method.drop is None:
        several = len(measured.groups) > 1
        for i in range(len(measured.groups)) if method.unreached != "error" or not several else ():
            statistics(method, measured, i)
    shares = solvable(method, measured)
    weights = [rows.matrix() for rows in shares]
    drop = [0] * len(weights)
    if method.pattern.fixed is None and shares:
        counts = [(w.numel(), w.numel() - int(w.count_nonzero())) for w in weights]
        drop = allocate(method, shares, counts, target, shards)
    return dict(zip((rows.layer for rows in shares), drop, strict=True))


def _on_this_rank(
    method: Method, drops: Mapping[Layer, int], measured: Measurements, shards: Ranks
) -> dict[Layer, int]:
    """What `JointPruner.solve` is told to drop: for pattern `row`, of the rows of this rank."""
    if method.pattern.kind != "row" or shards.group is None or not drops:
        return dict(drops)
    lengths = [len(rows) for rows in measured.shares if rows.layer in drops]
    return dict(zip(drops, drops_of_rows(list(drops.values()), lengths, shards), strict=True))


@torch.no_grad()
def solve_jointly(
    method: Method, measured: Measurements, target: float | None, shards: Ranks
) -> list[LayerUpdate]:
    """The new weights of a method that chooses its masks while it solves."""
    drops = _drops(method, measured, target, shards)
    local_drops = _on_this_rank(method, drops, measured, shards)
    changes: dict[Layer, LayerUpdate] = {}
    for i in range(len(measured.groups)):
        changes |= _solved_group(method, measured, i, local_drops, shards)
    changes |= _by_magnitude(method, measured, drops, target, shards)
    in_order = [changes[rows.layer] for rows in measured.shares if rows.layer in changes]
    return checked(method, with_unchanged(method, measured, in_order, shards), shards)


def _solved_group(
    method: Method, measured: Measurements, i: int, drops: Mapping[Layer, int], shards: Ranks
) -> dict[Layer, LayerUpdate]:
    """The layers of one group of statistics, which nothing holds on to afterwards."""
    stats = statistics(method, measured, i)
    group = [rows for rows in measured.groups[i] if rows.layer not in measured.unreached]
    changes: dict[Layer, LayerUpdate] = {}
    with shards.raise_on_all_ranks(), no_autocast(measured.shares):
        order = _largest_first(group, stats)
        following_one = [*order[1:], None][: len(order)]
        for rows, following in zip(
            track(order, f"{method.pruner.name}: weights"), following_one, strict=True
        ):
            stat = stats.get(rows)
            changes[rows.layer] = _solved(method, measured, rows, stat, drops, shards)
            if stat is not None and (following is None or stats.get(following) is not stat):
                stat.forget()
    return changes


def _solved(
    method: Method,
    measured: Measurements,
    rows: Rows,
    stat: Statistic | None,
    drops: Mapping[Layer, int],
    shards: Ranks,
) -> LayerUpdate:
    assert isinstance(method.pruner, JointPruner)
    pattern = method.pattern
    new, mask = solved(method.pruner, rows, stat, pattern, drops[rows.layer], shards)
    counted = torch.tensor([mask.numel(), mask.numel() - int(mask.count_nonzero())])
    row = layer_row(rows, pattern, *shards.all_reduce(counted).tolist())
    row = with_error(row, rows.matrix(), new, mask, stat, shards)
    return change_of(rows, new, mask, measured, row)


def _by_magnitude(
    method: Method,
    measured: Measurements,
    drops: Mapping[Layer, int],
    target: float | None,
    shards: Ranks,
) -> dict[Layer, LayerUpdate]:
    """The layers about which the data told nothing, where they are pruned all the same."""
    shares = [x for x in solvable(method, measured) if x.layer in measured.unreached]
    if not shares:
        return {}
    candidates = [candidate_of(method, rows, magnitudes(rows)) for rows in shares]
    for candidate in candidates:
        candidate.unreached = True
    decided = replace(method, drop={layer.name: k for layer, k in drops.items()})
    choices = select_masks(decided, candidates, target, shards)
    return {
        c.rows.layer: change_of(c.rows, c.rows.matrix(), c.mask, measured, c.row) for c in choices
    }
