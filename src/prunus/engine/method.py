"""The words of the engine: a method, and a layer on its way from scores to a new weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from prunus.allocators import Allocator, SignalAllocator
from prunus.calibration.memory_plan import Rows
from prunus.core.input_parts import input_parts
from prunus.core.layers import Layer
from prunus.core.names import few
from prunus.core.patterns import Pattern
from prunus.pruners import Pruner, supports


@dataclass(frozen=True)
class Method:
    """How to prune: by what score, into which shapes, spread how over the layers."""

    pruner: Pruner
    pattern: Pattern
    allocator: Allocator
    signals: Mapping[str, float] = field(default_factory=dict)
    """what the allocator measured in each layer, where it asks for signals"""
    drop: Mapping[str, int] | None = None
    """units to be gone in each layer, where that was decided before"""

    def fit(self, layers: Sequence[Layer]) -> list[Layer]:
        """The layers as this method wants to see them.

        Raises ValueError if the pruner or a layer does not go with the pattern.
        """
        supports(self.pruner, self.pattern)
        layers = [part for layer in layers for part in self._parts(layer)]
        _check_shapes(layers, self.pattern)
        for layer in layers:
            self.pruner.check(layer.matrix_shape()[1], self.pattern)
        grouped = self.pattern.kind in ("N:M", "block")
        return [layer.with_channels_inner() for layer in layers] if grouped else list(layers)

    def _parts(self, layer: Layer) -> list[Layer]:
        """The layer, or its parts where inputs are measured and these have different ones."""
        measured = any(_reads_inputs(x, layer) for x in (self.pruner, self.allocator))
        return input_parts(layer) if measured else [layer]


def _reads_inputs(source: object, layer: Layer) -> bool:
    stat = source.statistic(layer) if isinstance(source, (Pruner, SignalAllocator)) else None
    return getattr(stat, "reads", "") == "inputs"


def _check_shapes(layers: Sequence[Layer], pattern: Pattern) -> None:
    misfits = {layer.name: message for layer in layers if (message := _misfit(layer, pattern))}
    if misfits:
        first, *others = misfits
        more = f"; nor does it fit {', '.join(others)}" if others else ""
        raise ValueError(f"{first}: {misfits[first]}{more}")


def _misfit(layer: Layer, pattern: Pattern) -> str:
    try:
        pattern.check(*layer.matrix_shape(), layer.channels())
    except ValueError as error:
        return str(error)
    return ""


@dataclass(frozen=True)
class LayerResult:
    """What became of one layer, counted over all ranks."""

    name: str
    kind: str
    shape: tuple[int, ...]
    pattern: str
    size: int
    zeros: int
    itemsize: int
    """bytes of a weight"""
    score_lost: float | None
    """share of the layer's remaining score that went with what was pruned in this step; None for
    methods that have no scores"""
    error: float | None = None
    """squared error of the layer's outputs on the calibration data, as a share of the outputs
    themselves; None for methods that do not measure it"""

    @property
    def sparsity(self) -> float:
        return self.zeros / max(1, self.size)

    @property
    def collapsed(self) -> bool:
        """Whether nothing of the layer is left."""
        return self.zeros == self.size > 0

    @property
    def saved(self) -> int:
        """Bytes by which a compact file is smaller: the zeros', less a bit for each weight."""
        return max(0, self.zeros * self.itemsize - -(-self.size // 8))


def collapse_message(names: Sequence[str]) -> str:
    """What a person should know of layers that have no weights left."""
    remedy = "lower the sparsity, exclude the layer, or use an allocator such as 'uniform' or 'erk'"
    return (
        f"collapsed: no weight is left in {few(names)}, so the outputs may not depend on the "
        f"inputs; {remedy}"
    )


@dataclass
class LayerUpdate:
    """A new weight, not yet written; after `commit`, the old one."""

    layer: Layer
    weight: Tensor
    mask: Tensor
    row: LayerResult


@dataclass
class LayerScores:
    """This rank's rows of a layer, with the scores of their units, dead ones at minus infinity."""

    rows: Rows
    scores: Tensor
    pruned: int
    total: float


@dataclass
class LayerMask:
    """This rank's rows of a layer, with their keep-mask."""

    rows: Rows
    mask: Tensor
    row: LayerResult
