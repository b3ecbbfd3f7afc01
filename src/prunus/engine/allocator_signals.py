"""The signals that an allocator measures in the layers before it decides."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from prunus.allocators import Allocator, SignalAllocator
from prunus.calibration.calibration import Calibration
from prunus.calibration.input_pass import NO_INPUTS, measure_inputs
from prunus.calibration.measurements import check_measurable
from prunus.core.blocks import by_block, find_block_lists
from prunus.core.layers import Layer
from prunus.core.names import few
from prunus.core.ranks import all_ranks
from prunus.core.sharding import gather
from prunus.engine.checked_calls import unchanged
from prunus.engine.method import Method
from prunus.engine.unreached import refuse_unreached
from prunus.stats import Statistic, all_reduce_statistics, checked_statistic


def signal_statistics(allocator: Allocator, layers: Sequence[Layer]) -> dict[Layer, Statistic]:
    """The empty statistics that the allocator wants of the layers."""
    if not isinstance(allocator, SignalAllocator):
        return {}
    stats = {layer: allocator.statistic(layer) for layer in layers}
    return {layer: checked_statistic(stat) for layer, stat in stats.items() if stat is not None}


Measure = Callable[[Mapping[Layer, Statistic]], tuple[Mapping[Layer, Statistic], set[Layer]]]


@torch.no_grad()
def _signal(
    allocator: SignalAllocator, block: Sequence[Layer], stats: Mapping[Layer, Statistic]
) -> float:
    weights = [layer.matrix(gather(layer.local, layer.weight.detach())) for layer in block]
    who = f"allocator {allocator.name!r}: {type(allocator).__name__}.signal"
    with unchanged(allocator, weights, who) as copies:
        answer = allocator.signal([(w, stats.get(x)) for w, x in zip(copies, block, strict=True)])
    try:
        found = float(answer)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{who} gives {answer!r} for {block[0].name}; return a number") from None
    if not math.isfinite(found):
        raise ValueError(
            f"allocator {allocator.name!r} sees {found} in {block[0].name}: are there NaN in its "
            "weights or in the calibration data? nothing was pruned"
        )
    return found


def signals_of(
    method: Method, blocks: Sequence[Sequence[Layer]], measure: Measure
) -> dict[str, float | None]:
    """What the allocator sees in each block, by layer name; ``measure`` fills the statistics.

    In the layers that the data reached: None for a block without one. Raises ValueError for
    layers that it did not reach, unless the method says what becomes of them.
    """
    allocator = method.allocator
    assert isinstance(allocator, SignalAllocator)
    empty = signal_statistics(allocator, [layer for block in blocks for layer in block])
    stats, unreached = measure(empty)
    refuse_unreached(method, {layer: NO_INPUTS for layer in empty if layer in unreached})
    all_reduce_statistics(stats.values())
    found: dict[str, float | None] = {}
    for block in blocks:
        reached = [layer for layer in block if layer not in unreached]
        signal = _signal(allocator, reached, stats) if reached else None
        found |= dict.fromkeys((layer.name for layer in block), signal)
    return found


def completed(signals: Mapping[str, float | None]) -> dict[str, float]:
    """With the mean of what was seen elsewhere in blocks that no data reached.

    Raises ValueError if that is all of them.
    """
    seen = [signal for signal in signals.values() if signal is not None]
    if not seen and signals:
        raise ValueError(f"{NO_INPUTS} {few(list(signals))}; nothing was pruned")
    return {
        name: sum(seen) / len(seen) if signal is None else signal
        for name, signal in signals.items()
    }


def with_signals(
    method: Method, layers: Sequence[Layer], model: nn.Module, calibration: Calibration | None
) -> Method:
    """The method with all that its allocator wants to see, measured on the model as it is now."""
    allocator = method.allocator
    decided = method.signals or method.drop is not None
    if not isinstance(allocator, SignalAllocator) or decided:
        return method

    def measure(
        stats: Mapping[Layer, Statistic],
    ) -> tuple[Mapping[Layer, Statistic], set[Layer]]:
        check_measurable(stats, f"allocator {method.allocator.name!r}", calibration)
        if not stats:
            return stats, set()
        assert calibration is not None
        with all_ranks().raise_on_all_ranks():
            return measure_inputs(model, stats, calibration)

    blocks = by_block(find_block_lists(model), layers)
    return replace(method, signals=completed(signals_of(method, blocks, measure)))
