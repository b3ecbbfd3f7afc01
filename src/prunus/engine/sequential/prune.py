"""Pruning a model block by block, each on the outputs of the pruned blocks before it."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from prunus.allocators import SignalAllocator
from prunus.calibration.calibration import Calibration
from prunus.calibration.input_pass import measure_inputs
from prunus.calibration.memory_plan import Rows
from prunus.core.blocks import BlockLists, by_block, find_block_lists
from prunus.core.layers import Layer
from prunus.core.patterns import Pattern
from prunus.core.ranks import Ranks, all_ranks
from prunus.core.sharding import any_sharded
from prunus.core.wrappers import unwrap
from prunus.engine.allocation import allocate
from prunus.engine.allocator_signals import completed, signal_statistics, signals_of
from prunus.engine.method import Method
from prunus.engine.permute.folds import Fold
from prunus.engine.permute.step import Permute
from prunus.engine.sequential.access import Walk
from prunus.engine.sequential.lazy_weights import Weights, materialize, release
from prunus.engine.sequential.options import Sequential
from prunus.engine.sequential.record import BlockInput
from prunus.engine.sequential.replay import as_calibration, carry_on
from prunus.engine.sequential.resume import check_folder
from prunus.engine.sequential.walk import BlockPruning, SequentialResult
from prunus.stats import Statistic, checked_statistic

log = logging.getLogger("prunus")
NO_INPUTS = "sequential: blocks need inputs; pass calibration=prunus.Calibration(...)"


def blocks_for(model: nn.Module, how: Sequential) -> BlockLists:
    """The lists of blocks to go through. Raises ValueError if there is none."""
    blocks = find_block_lists(model, how.blocks)
    if blocks is None:
        raise ValueError(
            "sequential: the model has no list of blocks; name one (sequential: model.layers), or "
            "prune all at once"
        )
    return blocks


def check_sequential(method: Method, layers: Sequence[Layer]) -> None:
    """Raises ValueError for what cannot be pruned block by block."""
    name = method.pruner.name
    stats = [method.pruner.statistic(layer) for layer in layers]
    if any(stat is not None and checked_statistic(stat).reads == "gradients" for stat in stats):
        raise ValueError(f"sequential: pruner {name!r} needs gradients of the whole model's loss")
    if any_sharded(layers):
        raise ValueError("sequential: blocks sharded by FSDP2 cannot be moved; prune all at once")
    if method.allocator.ranks_scores and method.pattern.fixed is None:
        raise ValueError(
            f"sequential: allocator {method.allocator.name!r} ranks all layers before the first is "
            "pruned; use 'uniform', 'owl' or another"
        )


def prune_blocks(
    method: Method,
    layers: Sequence[Layer],
    target: float | None,
    model: nn.Module,
    calibration: Calibration | None,
    how: Sequential,
    permute: Permute | None = None,
    folds: Sequence[Fold] = (),
) -> SequentialResult:
    """Prune the blocks in order, committed; ``layers`` come from `Method.fit`.

    Each block sees the inputs that the pruned blocks before it put out, and runs twice: to measure,
    and for the next one's inputs (once more before, where the allocator measures inputs first).
    What is in no block comes last, all together. On failure all is taken back. A model read from
    disk has no changes to take back or to return.
    """
    if calibration is None:
        raise ValueError(NO_INPUTS)
    permute = permute or Permute()
    _check_places(model, how, permute, folds)
    weights = None if how.weights is None else Weights(how.weights)
    walk = Walk(model, calibration, blocks_for(model, how), layers, how, weights)
    walk.check_folder()
    with _rest(walk):
        if method.pattern.fixed is None:
            method = _decided(method, layers, target, walk)
        return BlockPruning(walk, method, target, permute, folds).run()


def _check_places(
    model: nn.Module, how: Sequential, permute: Permute, folds: Sequence[Fold]
) -> None:
    """Raises ValueError if blocks cannot be read or written where they should be."""
    if how.folder is not None and permute.shared == "gather" and folds:
        raise ValueError(
            "permute: shared='gather' gives layers an index that loaders of a folder do not know; "
            "use shared: leave, or no folder and prunus.save"
        )
    if how.folder is not None:
        with all_ranks().raise_on_all_ranks():
            check_folder(how.folder, how.weights)
    absent = [name for name, p in unwrap(model).named_parameters() if p.is_meta]
    if absent and how.weights is None:
        raise ValueError(
            f"sequential: {absent[0]} is on the meta device; load the model without device_map or "
            "offloading, or name its files, as Sequential(weights=..., folder=...)"
        )


@contextlib.contextmanager
def _rest(walk: Walk) -> Iterator[None]:
    """With all that is in no block, read from disk where it is there; afterwards as it was."""
    if walk.weights is None:
        yield
        return
    model = unwrap(walk.model)
    inside = {m for block in walk.blocks.modules for m in block.modules()}
    tie = getattr(model, "tie_weights", None)  # lost on the meta device
    if callable(tie):
        tie()
    rest = [m for m in model.modules() if m not in inside] if walk.outside else []
    held = [t for m in rest for t in (*m._parameters.values(), *m._buffers.values())]
    old = [(t, t.detach().clone()) for t in held if t is not None and not t.is_meta]
    filled = materialize(model, "", walk.weights, inside)
    try:
        yield
    finally:
        release(filled)
        with torch.no_grad():
            for t, was in old:
                t.copy_(was)


def _decided(method: Method, layers: Sequence[Layer], target: float | None, walk: Walk) -> Method:
    """The method with each layer's share decided, from the model as it is before."""
    allocator = method.allocator
    if isinstance(allocator, SignalAllocator):
        method = replace(method, signals=_signals(method, walk))
    rows = [Rows(layer, 0, layer.matrix_shape()[0]) for layer in layers]
    counts = [_units(layer, method.pattern) for layer in layers]
    drop = allocate(method, rows, counts, target, Ranks())
    fixed_drops = {layer.name: k for layer, k in zip(layers, drop, strict=True)}
    return replace(method, drop=fixed_drops)


def _units(layer: Layer, pattern: Pattern) -> tuple[int, int]:
    """How many of the pattern's units a layer has, and how many are gone; not known on meta."""
    alive = pattern.pool(layer.matrix(layer.local != 0))
    kept = alive.numel() if alive.is_meta else int(alive.count_nonzero())
    return alive.numel(), alive.numel() - kept


def _signals(method: Method, walk: Walk) -> dict[str, float]:
    """What the allocator sees, block by block, on the inputs of the model as it is."""
    allocator, signals = method.allocator, dict[str, "float | None"]()
    if signal_statistics(allocator, walk.everything):
        for numbers, items in walk.lists():
            for i, number in enumerate(numbers):
                signals |= _signals_of_block(method, walk, number, items, i)
    else:
        for number in range(len(walk.blocks)):
            signals |= _signals_of_block(method, walk, number, [], 0)
    with walk.within_reach():
        groups = by_block(walk.blocks, walk.outside)
        measure = functools.partial(measure_inputs, walk.model, calibration=walk.calibration)
        signals |= signals_of(method, groups, lambda x: measure(x) if x else (x, set()))
    return completed(signals)


def _signals_of_block(
    method: Method, walk: Walk, number: int, items: list[BlockInput], place: int
) -> dict[str, float | None]:
    layers = walk.layers.get(number)
    with walk.block(number) as block:
        measure = functools.partial(_measure, block, items, place)
        return signals_of(method, [layers] if layers else [], measure)


def _measure(
    block: nn.Module, items: list[BlockInput], number: int, stats: Mapping[Layer, Statistic]
) -> tuple[Mapping[Layer, Statistic], set[Layer]]:
    """Fill the statistics of one block, and carry the items on to the next one."""
    if not items:
        return stats, set()
    outputs: dict[int, Any] = {}
    filled = measure_inputs(block, stats, as_calibration(items, number, None, outputs))
    carry_on(block, items, number, outputs)
    return filled
