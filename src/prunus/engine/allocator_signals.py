"""The signals that an allocator measures in the layers before it decides."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from prunus.allocators import Allocator, SignalAllocator
from prunus.calibration.calibration import Calibration
from prunus.calibration.input_pass import measure_inputs
from prunus.calibration.measurements import check_measurable
from prunus.core.blocks import by_block, find_blocks
from prunus.core.layers import Layer
from prunus.core.ranks import all_ranks
from prunus.core.sharding import gather
from prunus.engine.method import Method
from prunus.stats import Statistic
from prunus.stats.base import all_reduce_statistics


def signal_statistics(allocator: Allocator, layers: Sequence[Layer]) -> dict[Layer, Statistic]:
    """The empty statistics that the allocator wants of the layers."""
    if not isinstance(allocator, SignalAllocator):
        return {}
    stats = {layer: allocator.statistic(layer) for layer in layers}
    return {layer: stat for layer, stat in stats.items() if stat is not None}


@torch.no_grad()
def signal(
    allocator: SignalAllocator, block: Sequence[Layer], stats: Mapping[Layer, Statistic]
) -> dict[str, float]:
    """What the allocator sees in one block, by layer name."""
    parts = [
        (layer.matrix(gather(layer.local, layer.weight.detach())), stats.get(layer))
        for layer in block
    ]
    seen = allocator.signal(parts)
    if not math.isfinite(seen):
        raise ValueError(
            f"allocator {allocator.name!r} sees {seen} in {block[0].name}: are there NaN in its "
            "weights or in the calibration data? nothing was pruned"
        )
    return {layer.name: seen for layer in block}


def with_signals(
    method: Method, layers: Sequence[Layer], model: nn.Module, calibration: Calibration | None
) -> Method:
    """The method with all that its allocator wants to see, measured on the model as it is now."""
    allocator = method.allocator
    if not isinstance(allocator, SignalAllocator) or method.signals:
        return method
    stats = signal_statistics(allocator, layers)
    check_measurable(stats, f"allocator {allocator.name!r}", calibration)
    if stats:
        assert calibration is not None
        with all_ranks().raise_on_all_ranks():
            stats = measure_inputs(model, stats, calibration)
        all_reduce_statistics(stats.values())
    signals: dict[str, float] = {}
    for block in by_block(find_blocks(model), layers):
        signals |= signal(allocator, block, stats)
    return replace(method, signals=signals)
