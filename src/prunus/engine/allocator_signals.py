"""The signals that an allocator measures in the layers before it decides."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from prunus.allocators import Allocator, SignalAllocator
from prunus.calibration.calibration import Calibration
from prunus.calibration.input_pass import measure_inputs
from prunus.calibration.measurements import check_measurable
from prunus.core.blocks import by_block, find_block_lists
from prunus.core.layers import Layer
from prunus.core.ranks import all_ranks
from prunus.core.sharding import gather
from prunus.engine.method import Method
from prunus.stats import Statistic, all_reduce_statistics, checked_statistic


def signal_statistics(allocator: Allocator, layers: Sequence[Layer]) -> dict[Layer, Statistic]:
    """The empty statistics that the allocator wants of the layers."""
    if not isinstance(allocator, SignalAllocator):
        return {}
    stats = {layer: allocator.statistic(layer) for layer in layers}
    return {layer: checked_statistic(stat) for layer, stat in stats.items() if stat is not None}


Measure = Callable[[Mapping[Layer, Statistic]], Mapping[Layer, Statistic]]


@torch.no_grad()
def _signal(
    allocator: SignalAllocator, block: Sequence[Layer], stats: Mapping[Layer, Statistic]
) -> float:
    parts = [
        (layer.matrix(gather(layer.local, layer.weight.detach())), stats.get(layer))
        for layer in block
    ]
    found = allocator.signal(parts)
    if not math.isfinite(found):
        raise ValueError(
            f"allocator {allocator.name!r} sees {found} in {block[0].name}: are there NaN in its "
            "weights or in the calibration data? nothing was pruned"
        )
    return found


def signals_of(
    allocator: SignalAllocator, blocks: Sequence[Sequence[Layer]], measure: Measure
) -> dict[str, float]:
    """What the allocator sees in each block, by layer name; ``measure`` fills the statistics."""
    empty = signal_statistics(allocator, [layer for block in blocks for layer in block])
    stats = measure(empty)
    all_reduce_statistics(stats.values())
    found: dict[str, float] = {}
    for block in blocks:
        signal = _signal(allocator, block, stats)
        found |= dict.fromkeys((layer.name for layer in block), signal)
    return found


def with_signals(
    method: Method, layers: Sequence[Layer], model: nn.Module, calibration: Calibration | None
) -> Method:
    """The method with all that its allocator wants to see, measured on the model as it is now."""
    allocator = method.allocator
    decided = method.signals or method.drop is not None
    if not isinstance(allocator, SignalAllocator) or decided:
        return method

    def measure(stats: Mapping[Layer, Statistic]) -> Mapping[Layer, Statistic]:
        check_measurable(stats, f"allocator {method.allocator.name!r}", calibration)
        if not stats:
            return stats
        assert calibration is not None
        with all_ranks().raise_on_all_ranks():
            return measure_inputs(model, stats, calibration)

    blocks = by_block(find_block_lists(model), layers)
    return replace(method, signals=signals_of(allocator, blocks, measure))
