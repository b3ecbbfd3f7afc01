"""One pruning step: statistics -> scores -> shares -> masks -> new weights -> commit.

Everything that can fail happens before the first weight is written, so a model is either pruned or
untouched.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from prunus.calibration.calibration import Calibration
from prunus.calibration.measurements import Measurements
from prunus.core.layers import Layer
from prunus.core.patterns import NM, Pattern
from prunus.core.ranks import Ranks
from prunus.core.sharding import shards_of
from prunus.core.wrappers import reshard
from prunus.engine.allocation import select_masks
from prunus.engine.allocator_signals import with_signals
from prunus.engine.joint_solve import solve_jointly
from prunus.engine.layer_solve import check_loaded, measure, rebuild, score
from prunus.engine.method import LayerUpdate, Method
from prunus.pruners import JointPruner, ScorePruner
from prunus.solvers import selection

log = logging.getLogger("prunus")


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


def check_reachable(layers: Sequence[Layer], pattern: Pattern, target: float) -> None:
    """Raises ValueError if more is pruned already than the target asks for."""
    check_loaded(layers)
    present = present_sparsity(layers, pattern)
    size = sum(math.prod(layer.shape) for layer in layers)
    if present * size > target * size + 1:
        raise ValueError(
            f"sparsity is {present:.4f} already, above the target {target:g}; pruned weights do "
            f"not come back: raise the target to {present:.4f} or more"
        )


def _pieces(change: LayerUpdate) -> Iterator[tuple[Tensor, Tensor]]:
    """The weight in the model beside the one in the change, a few rows at a time."""
    w = change.layer.local
    rows = max(1, selection.CHUNK * len(w) // max(1, w.numel()))
    yield from zip(torch.split(w, rows), torch.split(change.weight, rows), strict=True)


@torch.no_grad()
def commit(changes: Sequence[LayerUpdate]) -> None:
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
    torch.clear_autocast_cache()  # holds low-precision copies of the weights as they were


Stage = tuple[Method, "float | None"]


def stage_count(method: Method) -> int:
    """How many times a pruning step measures anew."""
    count, pattern = method.pruner.num_recomputations, method.pattern
    return int(min(count, pattern.m - pattern.n) if isinstance(pattern, NM) else count)


def stages_of(method: Method, layers: Sequence[Layer], target: float | None) -> list[Stage]:
    """The steps of one pruning step: several where the pruner measures anew on the way.

    Raises ValueError if there is no overall sparsity to ramp to.
    """
    pruner = method.pruner
    if pruner.num_recomputations == 1:
        return [(method, target)]
    if isinstance(method.pattern, NM):
        patterns = pruner.stages_of_groups(method.pattern)
        return [(replace(method, pattern=pattern), None) for pattern in patterns]
    if target is None:
        raise ValueError(
            "num_recomputations ramps up to an overall sparsity, and a table alone has none; give "
            "sparsity beside it, or set num_recomputations to 1"
        )
    present = present_sparsity(layers, method.pattern)
    return [(method, goal) for goal in pruner.stages(min(present, target), target)]


def prepare_sweep(
    method: Method, layers: Sequence[Layer], model: nn.Module, calibration: Calibration | None
) -> Callable[[float], list[LayerUpdate]]:
    """A function of the sparsity that prunes the model as it is then, committed.

    Statistics and scores are computed here, once, from the weights as they are now; only a pruner
    that measures anew on the way does all of it at each call.
    """
    if method.pruner.num_recomputations > 1:
        return lambda target: prune_step(method, layers, target, model, calibration)
    method = with_signals(method, layers, model, calibration)
    measured, shards = measure(method, layers, model, calibration)
    scored = isinstance(method.pruner, ScorePruner)
    candidates = score(method, measured, shards) if scored else []

    def committed(target: float) -> list[LayerUpdate]:
        if scored:
            choices = select_masks(method, candidates, target, shards)
            changes = rebuild(method, measured, choices, shards)
        else:
            changes = solve_jointly(method, measured, target, shards)
        reshard(model)
        commit(changes)
        return changes

    return committed


def prune_step(
    method: Method,
    layers: Sequence[Layer],
    target: float | None,
    model: nn.Module,
    calibration: Calibration | None,
    measured_before: tuple[Measurements, Ranks] | None = None,
) -> list[LayerUpdate]:
    """One whole step, committed. ``layers`` come from `Method.fit`.

    ``measured_before`` serves the first stage, where it has been measured already. A failure in a
    later stage takes back the earlier ones.
    """
    method = with_signals(method, layers, model, calibration)
    first: list[LayerUpdate] = []
    changes: list[LayerUpdate] = []
    begin = 0
    try:
        for stage, goal in stages_of(method, layers, target):
            measured, shards = measured_before or measure(stage, layers, model, calibration, begin)
            measured_before = None
            changes = _solve(stage, measured, goal, shards)
            begin += measured.used
            del measured  # statistics are large
            reshard(model)  # an evaluation may have come before
            commit(changes)
            first = first or changes
    except BaseException:
        reshard(model)
        commit(first)
        raise
    return [replace(last, weight=old.weight) for last, old in zip(changes, first, strict=True)]


def _solve(
    method: Method, measured: Measurements, target: float | None, shards: Ranks
) -> list[LayerUpdate]:
    if isinstance(method.pruner, JointPruner):
        return solve_jointly(method, measured, target, shards)
    candidates = score(method, measured, shards)
    choices = select_masks(method, candidates, target, shards)
    del candidates  # the scores are as large as the weights
    return rebuild(method, measured, choices, shards)
