"""What the records of a run say, in the shape in which a page shows it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from prunus.records import Event

_NOT_METRICS = ("event", "step", "time")
_NOT_SWEPT = (*_NOT_METRICS, "pruner", "pattern", "target", "sparsity", "layers", "saved")


class Summary:
    """The events of one run, sorted by what they tell."""

    def __init__(self, events: Sequence[Event]) -> None:
        self.prunes = [e for e in events if e["event"] == "prune"]
        self.metrics = [e for e in events if e["event"] == "metrics"]
        self.sweep = sorted((e for e in events if e["event"] == "sweep"), key=_sparsity)
        self.start: Event = next((e for e in events if e["event"] == "start"), {})
        self.steps = max((int(e["step"]) for e in events), default=0)

    @cached_property
    def layers(self) -> dict[str, float]:
        """Layer -> sparsity after its last pruning step."""
        return {name: s for event in self.prunes for name, s in event["layers"].items()}

    @cached_property
    def layer_rows(self) -> list[tuple[str, str, str, float]]:
        """(layer, pruner, pattern, sparsity) at the end."""
        last = {name: event for event in self.prunes for name in event["layers"]}
        return [(n, e["pruner"], e["pattern"], e["layers"][n]) for n, e in last.items()]

    @property
    def sparsity(self) -> float | None:
        return float(self.prunes[-1]["sparsity"]) if self.prunes else None

    @property
    def size(self) -> tuple[int, int] | None:
        """Bytes of the model before, and as a compact file after."""
        if "bytes" not in self.start:
            return None
        saved = {n: b for event in self.prunes for n, b in event.get("saved", {}).items()}
        return int(self.start["bytes"]), int(self.start["bytes"] - sum(saved.values()))

    def series(self) -> dict[str, list[tuple[int, float]]]:
        """Metric -> (step, value) pairs, in the order in which they were first logged."""
        result: dict[str, list[tuple[int, float]]] = {}
        for event in self.metrics:
            for name, value in event.items():
                if name not in _NOT_METRICS:
                    result.setdefault(name, []).append((int(event["step"]), float(value)))
        return result

    def swept(self) -> dict[str, list[tuple[float, float]]]:
        """Metric -> (sparsity, value) pairs of the one-shot sweep."""
        result: dict[str, list[tuple[float, float]]] = {}
        for event in self.sweep:
            for name, value in event.items():
                if name not in _NOT_SWEPT:
                    result.setdefault(name, []).append((_sparsity(event), float(value)))
        return result

    @property
    def tiles(self) -> list[tuple[str, str]]:
        """Headline numbers: (label, value)."""
        tiles = []
        if self.sparsity is not None:
            tiles.append(("sparsity", f"{100 * self.sparsity:.1f} %"))
            tiles.append(("layers pruned", str(len(self.layers))))
        if self.size is not None and self.prunes:
            tiles.append(("size, compact", f"{in_units(self.size[0])} → {in_units(self.size[1])}"))
        tiles += [(f"final {n}", f"{values[-1][1]:.4g}") for n, values in self.series().items()][:3]
        if self.steps:
            tiles.append(("optimizer steps", f"{self.steps:,}"))
        return tiles


def _sparsity(event: Event) -> float:
    return float(event["sparsity"])


def in_units(nbytes: float) -> str:
    """Bytes for people: ``3.2 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            return f"{nbytes:.3g} {unit}" if nbytes < 1000 else f"{nbytes:.0f} {unit}"
        nbytes /= 1024
    raise AssertionError
