"""What the records of a run say, in the shape in which a page shows it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import cached_property
from typing import NamedTuple

from prunus.core.default_dense_layers import dense_line
from prunus.report.layer_names import short, without_digits, without_indices
from prunus.report.lines import Event
from prunus.report.records import number

MOST_BARS = 60
_NOT_METRICS = ("event", "step", "time")
Points = list[tuple[float, float]]


class Bar(NamedTuple):
    """A layer, or the span of several."""

    label: str
    sparsity: float
    low: float
    high: float


class Row(NamedTuple):
    """A layer at the end."""

    name: str
    pruner: str
    pattern: str
    size: int
    sparsity: float


class Summary:
    """The events of one run, sorted by what they tell."""

    def __init__(self, events: Sequence[Event]) -> None:
        self.prunes = [e for e in events if e["event"] == "prune"]
        self.metrics = [e for e in events if e["event"] == "metrics"]
        self.sweep = sorted((e for e in events if e["event"] == "sweep"), key=_sparsity)
        self.execution: Event = next((e for e in events[::-1] if e["event"] == "execution"), {})
        self.start: Event = next((e for e in events if e["event"] == "start"), {})
        self.constant = any(e["event"] == "constant_output" for e in events)
        """whether the output no longer depends on the input"""
        cuts = [name for e in events if e["event"] == "cut" for name in e["layers"]]
        self.cut = list(dict.fromkeys(cuts))
        """layers that nothing passes any more"""
        self.steps = max((int(e["step"]) for e in events), default=0)
        self.times = [float(e["time"]) for e in events if "time" in e]

    @cached_property
    def rows(self) -> list[Row]:
        """Each layer after its last pruning step; of a sweep alone, at its highest sparsity."""
        last = {name: e for e in self.prunes or self.sweep[-1:] for name in e["layers"]}
        return [
            Row(name, e["pruner"], e["pattern"], e["sizes"][name], e["layers"][name])
            for name, e in last.items()
        ]

    @property
    def sparsity(self) -> float | None:
        """Share of the rows' weights that are pruned."""
        return self._pooled({row.name: row.sparsity for row in self.rows}) if self.rows else None

    def _pooled(self, layers: Mapping[str, float]) -> float:
        pruned = sum(row.size * layers.get(row.name, 0.0) for row in self.rows)
        return float(pruned / max(1, sum(row.size for row in self.rows)))

    def progress(self) -> Points:
        """(step, sparsity of all layers that the run prunes) after each pruning step."""
        layers: dict[str, float] = {}
        points = {}
        for event in self.prunes:
            layers.update(event["layers"])
            points[float(event["step"])] = self._pooled(layers)
        return list(points.items())

    def parts(self) -> list[list[Event]]:
        """The pruning steps by the layers they prune, such as those of two recipe entries."""
        result: dict[frozenset[str], list[Event]] = {}
        for event in self.prunes:
            result.setdefault(frozenset(event["layers"]), []).append(event)
        return list(result.values())

    @property
    def collapsed(self) -> list[str]:
        """Layers of which nothing is left at the end."""
        last = {name: event for event in self.prunes for name in event["layers"]}
        return [name for name, event in last.items() if name in event.get("collapsed", ())]

    def _last(self, key: str) -> dict[str, str]:
        """What the last step of each layer says of it under this key."""
        events = self.prunes or self.sweep[-1:]
        found: dict[str, str] = {}
        for event in events:
            found = {name: how for name, how in found.items() if name not in event["layers"]}
            more = event.get(key)
            found |= more if isinstance(more, dict) else {}
        return found

    @property
    def unreached(self) -> list[str]:
        """Layers without calibration data, and what was done with them."""
        return [f"{name} ({how})" for name, how in self._last("unreached").items()]

    @property
    def misfits(self) -> list[str]:
        """Layers that were chosen and do not fit, with the reasons."""
        return [f"{name} ({why})" for name, why in self._last("misfits").items()]

    @property
    def left_dense(self) -> str:
        """What the default left dense, and why."""
        spared = self.start.get("left_dense")
        return dense_line(spared) if spared else ""

    @property
    def size(self) -> tuple[int, int] | None:
        """Bytes of the model before, and as a compact file after."""
        if "bytes" not in self.start:
            return None
        events = self.prunes or self.sweep[-1:]
        saved = {name: nbytes for event in events for name, nbytes in event["saved"].items()}
        return int(self.start["bytes"]), int(self.start["bytes"] - sum(saved.values()))

    def series(self) -> dict[str, Points]:
        """Metric -> (step, value) pairs, in the order in which they were first logged."""
        result: dict[str, Points] = {}
        for event in self.metrics:
            for name, value in event.items():
                if name not in _NOT_METRICS and isinstance(value, int | float | None):
                    result.setdefault(name, []).append((float(event["step"]), _float(value)))
        return result

    @staticmethod
    def shown(value: float | str | None) -> str:
        """A value of a sweep as its table has it; huge ones with an exponent."""
        if isinstance(value, str):
            return value
        known = _float(value)
        return f"{known:.4f}" if abs(known) < 1e6 else f"{known:.4g}"

    def sweep_columns(self) -> list[str]:
        """Of pattern and seed what differs between the rows of sweeps."""
        return [k for k in ("pattern", "seed") if len({e.get(k) for e in self.sweep}) > 1]

    def swept(self) -> dict[str, dict[str, Points]]:
        """Metric -> pruner, and pattern where there are several -> (sparsity, value) pairs.

        Of one-shot sweeps, a pair for each seed.
        """
        several = len({event["pattern"] for event in self.sweep}) > 1
        result: dict[str, dict[str, Points]] = {}
        for event in self.sweep:
            values = {k: v for k, v in event["values"].items() if not isinstance(v, str)}
            for name, value in values.items():
                lines = result.setdefault(name, {})
                label = event["pruner"] + (f", {event['pattern']}" if several else "")
                lines.setdefault(label, []).append((_sparsity(event), _float(value)))
        return result

    def bars(self) -> list[Bar]:
        """A bar for each layer; of many layers, for each kind: ``blocks.*.mlp.fc1``."""
        if len(self.rows) <= MOST_BARS:
            return [_bar(short(row.name), [row]) for row in self.rows]
        for kind in (without_indices, without_digits):
            groups: dict[str, list[Row]] = {}
            for row in self.rows:
                groups.setdefault(kind(row.name), []).append(row)
            if 3 <= len(groups) <= MOST_BARS:
                return [_bar(f"{short(name)}  ×{len(rows)}", rows) for name, rows in groups.items()]
        each = -(-len(self.rows) // MOST_BARS)
        chunks = [self.rows[i : i + each] for i in range(0, len(self.rows), each)]
        return [_bar(f"{short(rows[0].name)}  ×{len(rows)}", rows) for rows in chunks]

    @property
    def methods(self) -> str:
        """Such as ``magnitude, unstructured``."""
        events = self.prunes or self.sweep
        return "; ".join(dict.fromkeys(f"{e['pruner']}, {e['pattern']}" for e in events))

    @property
    def day(self) -> str:
        if not self.times:
            return ""
        return datetime.fromtimestamp(max(self.times), timezone.utc).strftime("%Y-%m-%d %H:%M UTC")

    @property
    def tiles(self) -> list[tuple[str, str]]:
        """Headline numbers: (label, value)."""
        tiles = []
        if self.sparsity is not None:
            few, at = len(self.rows), "highest " if not self.prunes else ""
            of = f"{at}sparsity of {few} layer{'s' if few > 1 else ''}"
            tiles.append((of, f"{100 * self.sparsity:.1f} %"))
            if "parameters" in self.start:
                share = sum(r.size * r.sparsity for r in self.rows) / max(
                    1, self.start["parameters"]
                )
                tiles.append(("of the whole model", f"{100 * share:.1f} %"))
        if self.size is not None and self.rows:
            tiles.append(("size, compact", f"{in_units(self.size[0])} → {in_units(self.size[1])}"))
        tiles += [(f"final {n}", f"{values[-1][1]:.4g}") for n, values in self.series().items()][:3]
        if self.steps:
            tiles.append(("optimizer steps", f"{self.steps:,}"))
        return tiles

    def execution_rows(self) -> list[tuple[str, list[str], str, str]]:
        """Layer, numbers, the form in which it runs, and why it is dense if it is.

        The numbers are sparsity, input rows, milliseconds and bytes dense, and the same of the
        fastest form that was measured beside it.
        """
        rows = []
        for layer in self.execution.get("layers", ()):
            ms, nbytes = layer["ms"], layer["nbytes"]
            best = min((n for n in ms if n != "dense"), key=ms.get, default="")
            numbers = [f"{layer['sparsity']:.4f}", str(layer["rows"] or "")]
            for form in ("dense", best):
                numbers.append(f"{ms[form]:.3f}" if form in ms else "")
                numbers.append(in_units(nbytes[form]) if form in nbytes else "")
            rows.append((layer["name"], numbers, layer["form"], layer["why"]))
        return rows

    def metric_rows(self) -> list[tuple[str, list[str]]]:
        """Metric -> first, lowest, highest and last value."""
        rows = []
        for name, points in self.series().items():
            values = [value for _, value in points]
            known = [value for value in values if math.isfinite(value)] or values
            four = values[0], min(known), max(known), values[-1]
            rows.append((name, [f"{value:.4g}" for value in four]))
        return rows


def _float(value: float | None) -> float:
    """The value; NaN for null, as some programs write it."""
    return math.nan if value is None else number(value)


def _sparsity(event: Event) -> float:
    return float(event["sparsity"])


def _bar(label: str, rows: Sequence[Row]) -> Bar:
    pruned = sum(row.size * row.sparsity for row in rows)
    each = [row.sparsity for row in rows]
    return Bar(label, pruned / max(1, sum(row.size for row in rows)), min(each), max(each))


def in_units(nbytes: float) -> str:
    """Bytes for people: ``3.2 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1000 or unit == "GiB":
            return f"{nbytes:.3g} {unit}" if nbytes < 1000 else f"{nbytes:.0f} {unit}"
        nbytes /= 1024
    raise AssertionError
