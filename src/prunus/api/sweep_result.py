"""What a sweep found, as a table, as curves, and in the records of a folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from torch import nn

from prunus.engine.method import misfits_message
from prunus.pruners import Pruner
from prunus.report.lines import Event
from prunus.report.records import FILE, Recorder, is_main, read_records
from prunus.report.tables import Recorded

Evaluate = Callable[[nn.Module], Any]
Metrics = dict[str, float]


class SweepRow(NamedTuple):
    """One evaluation."""

    pruner: str
    pattern: str
    seed: int | None
    sparsity: float
    metrics: Metrics


@dataclass
class SweepResult(Recorded):
    """What an evaluation said at each sparsity.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    >>> zeros = lambda m: prunus.sparsity(m)["0"]
    >>> prunus.sweep(model, "magnitude", [0.25, 0.5], evaluate=zeros).values
    {0.25: {'value': 0.25}, 0.5: {'value': 0.5}}
    >>> prunus.sweep(model, ["magnitude", "ri"], [0.25], evaluate=zeros).curves
    {'magnitude': {0.25: {'value': 0.25}}, 'ri': {0.25: {'value': 0.25}}}
    """

    values: dict[float, Metrics]
    """sparsity -> metrics, where one method was tried (means, where from several seeds); where
    several were, `curves` has them and this is empty"""
    rows: list[SweepRow] = field(default_factory=list)
    """each evaluation"""
    recorder: Recorder = field(default_factory=Recorder, repr=False)
    misfits: dict[str, str] = field(default_factory=dict)
    """layer name -> why it does not fit, and was dense throughout"""
    unreached: list[str] = field(default_factory=list)
    """what was done with layers about which the calibration data told nothing"""
    title = "sweep"

    def __post_init__(self) -> None:
        self.rows = self.rows or [SweepRow("", "", None, s, m) for s, m in self.values.items()]

    @property
    def curves(self) -> dict[str, dict[float, Metrics]]:
        """Label -> sparsity -> metrics, means over the seeds; labels name what was varied."""
        patterns = len({row.pattern for row in self.rows}) > 1
        found: dict[str, dict[float, list[Metrics]]] = {}
        for row in self.rows:
            label = f"{row.pruner}, {row.pattern}" if patterns else row.pruner
            found.setdefault(label, {}).setdefault(row.sparsity, []).append(row.metrics)
        return {
            label: {sparsity: _mean(each) for sparsity, each in curve.items()}
            for label, curve in found.items()
        }

    def summed_up(self) -> SweepResult:
        """Itself, with `values` of all rows where these are of one method."""
        curves = list(self.curves.values())
        self.values = curves[0] if len(curves) == 1 else {}
        return self

    def notes(self) -> Sequence[str]:
        return [*([misfits_message(self.misfits)] if self.misfits else []), *self.unreached]

    def _varied(self) -> list[int]:
        """Which of pruner, pattern and seed the rows differ in."""
        return [i for i in range(3) if len({row[i] for row in self.rows}) > 1]

    def header(self) -> Sequence[str]:
        names = dict.fromkeys(name for row in self.rows for name in row.metrics)
        return *(SweepRow._fields[i] for i in self._varied()), "sparsity", *names

    def cells(self) -> Iterable[Sequence[str]]:
        names = self.header()[len(self._varied()) + 1 :]
        for row in self.rows:
            varied = [str(row[i]) for i in self._varied()]
            shown = [f"{row.metrics[n]:.4g}" if n in row.metrics else "" for n in names]
            yield *varied, f"{row.sparsity:.4f}", *shown

    def report(self, directory: str | os.PathLike[str]) -> None:
        """Add to the records there, and write ``report.html`` and ``report.png`` anew.

        What is there stays, but for evaluations of the same pruner, pattern, seed and sparsity,
        whose place these take.
        """
        from prunus.report import write_report

        if not is_main():
            return
        together = Recorder()
        together.events = list(self.recorder.events)
        if (Path(directory) / FILE).is_file():
            together.events = _added(read_records(directory), self.recorder.events)
        together.save(directory)
        write_report(directory)


def _mean(metrics: Sequence[Metrics]) -> Metrics:
    names = dict.fromkeys(name for each in metrics for name in each)
    if len(metrics) == 1:
        return dict(metrics[0])
    return {name: fmean(each[name] for each in metrics if name in each) for name in names}


def _identity(event: Event) -> tuple[Any, ...]:
    return (*(event.get(key) for key in ("event", "pruner", "pattern", "seed")), event["sparsity"])


def _added(before: Sequence[Event], now: Sequence[Event]) -> list[Event]:
    """The events of a folder, and those of a sweep after them; one start is enough."""
    swept = [event for event in now if event["event"] == "sweep"]
    anew = {_identity(event) for event in swept}
    old = [e for e in before if e["event"] != "sweep" or _identity(e) not in anew]
    started = any(event["event"] == "start" for event in old)
    return [*(() if started else now[:1]), *old, *swept]


def labels_of(pruners: Any, read: Callable[[Any], Pruner]) -> dict[str, Pruner]:
    """Labels and pruners, of a mapping of them or of a list.

    Names where these are enough, else with the settings that differ. Raises ValueError for two of
    one label.
    """
    if isinstance(pruners, Mapping):
        return {str(label): read(pruner) for label, pruner in pruners.items()}
    found = [read(pruner) for pruner in pruners]
    names = [pruner.name for pruner in found]
    labels = [p.name if names.count(p.name) == 1 else _with_settings(p) for p in found]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ValueError(f"{twice[0]} stands twice among the pruners; name each once")
    return dict(zip(labels, found, strict=True))


def _with_settings(pruner: Any) -> str:
    """Such as ``cap(block_size=64)``: what differs from the defaults."""
    fields = getattr(pruner, "__dataclass_fields__", {})
    changed = [n for n, f in fields.items() if getattr(pruner, n) != f.default]
    settings = ", ".join(f"{name}={getattr(pruner, name)!r}" for name in changed)
    return f"{pruner.name}({settings})" if settings else pruner.name
