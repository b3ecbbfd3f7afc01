"""The words of the engine: a method, and a layer on its way from scores to a new weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from torch import Tensor

from prunus.allocators import Allocator, SignalAllocator
from prunus.calibration.memory_plan import Rows
from prunus.core.input_parts import input_parts
from prunus.core.layers import Layer
from prunus.core.names import few
from prunus.core.patterns import Pattern
from prunus.pruners import Pruner
from prunus.stats import checked_statistic

Unreached = Literal["error", "magnitude", "dense"]
UNREACHED: tuple[str, ...] = get_args(Unreached)


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
    unreached: Unreached = field(default="error", repr=False)
    """what becomes of layers about which the calibration data tells nothing"""

    def fit(self, layers: Sequence[Layer]) -> list[Layer]:
        """The layers as this method wants to see them."""
        layers = [part for layer in layers for part in self._parts(layer)]
        grouped = self.pattern.kind in ("N:M", "block")
        return [layer.with_channels_inner() for layer in layers] if grouped else list(layers)

    def _parts(self, layer: Layer) -> list[Layer]:
        """The layer, or its parts where inputs are measured and these have different ones."""
        return input_parts(layer) if self.readers(layer) else [layer]

    def readers(self, layer: Layer) -> list[str]:
        """Who wants to know of the layer's inputs."""
        wanted = {f"pruner {self.pruner.name!r}": self.pruner.statistic(layer)}
        if isinstance(self.allocator, SignalAllocator):
            wanted[f"allocator {self.allocator.name!r}"] = self.allocator.statistic(layer)
        stats = {who: checked_statistic(stat) for who, stat in wanted.items() if stat is not None}
        return [who for who, stat in stats.items() if stat.reads == "inputs"]


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
    unreached: str = ""
    """`magnitude` or `dense`: what was done for lack of data; empty where there was some"""

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


def unreached_messages(rows: Sequence[LayerResult]) -> list[str]:
    """What a person should know of layers about which the data told nothing."""
    done = {"dense": "left as they are", "magnitude": "pruned by magnitude"}
    named = {how: [row.name for row in rows if row.unreached == how] for how in done}
    return [
        f"{done[how]}, because no calibration data tells of them: {few(names)}"
        for how, names in named.items()
        if names
    ]


def misfits_message(misfits: Mapping[str, str]) -> str:
    """What a person should know of layers that were chosen and do not fit; empty without any."""
    if not misfits:
        return ""
    return f"do not fit, left dense: {few(list(misfits))} ({next(iter(misfits.values()))})"


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
    unreached: bool = False
    """whether the scores are magnitudes, for lack of data"""


@dataclass
class LayerMask:
    """This rank's rows of a layer, with their keep-mask."""

    rows: Rows
    mask: Tensor
    row: LayerResult
