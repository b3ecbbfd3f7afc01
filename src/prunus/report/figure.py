"""The picture of a run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import cycle
from statistics import fmean
from typing import Any

from prunus.report.layer_names import kinds
from prunus.report.summary import Bar, Points, Summary

INK, GREY, PALE, GREEN, PLUM, ORANGE, BLUE = (
    "#222222", "#8a8a8a", "#e9e9e9", "#2f7d4f", "#7a3b69", "#c8702a", "#3b6a9c",
)  # fmt: skip
STYLE = {  # what a matplotlibrc must not change
    "font.family": "sans-serif",
    "text.usetex": False,
    "text.parse_math": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "prunus",
}
MOST_PANELS, MOST_PARTS, MOST_MARKS = 8, 5, 40
PANEL, BAR, WIDE_BAR, AROUND = 2.3, 0.21, 0.36, 1.0
"""heights in inches: of a panel, of a bar, at least and at most, and of what is around the bars"""
MOST = 1e100
"""values beyond it are told, not drawn: axes of 1e308 overflow"""


def draw(summary: Summary) -> Any:
    """A matplotlib Figure: on the left what changes over time, on the right the layers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels, bars = _panels(summary), summary.bars()
    height = max(PANEL * len(panels), BAR * len(bars) + AROUND)
    wide = bool(panels and bars)
    figure: Any = Figure(figsize=(10 if wide else 6.5, height), layout="constrained")
    FigureCanvasAgg(figure)
    if not panels and not bars:
        figure.text(0.5, 0.5, "no weights were pruned", ha="center", color=INK)
    columns = [figure, figure]
    if wide:
        left, right = figure.subfigures(1, 2, width_ratios=[1.15, 1])
        columns[0] = _top(left, PANEL * len(panels) / height)
        columns[1] = _top(right, (WIDE_BAR * len(bars) + AROUND) / height)
    if panels:
        axes = columns[0].subplots(len(panels), 1, squeeze=False)[:, 0]
        for axis, panel in zip(axes, panels, strict=True):
            panel(_plain(axis))
    if bars:
        _layers(_plain(columns[1].subplots()), bars, summary)
    return figure


def _top(column: Any, share: float) -> Any:
    """The upper part of a column; bars and panels keep their height beside a taller neighbour."""
    if share > 0.95:
        return column
    return column.subfigures(2, 1, height_ratios=[share, 1 - share])[0]


def _panels(summary: Summary) -> list[Callable[[Any], None]]:
    panels: list[Callable[[Any], None]] = []
    if summary.prunes and summary.steps:
        panels.append(partial(_sparsity, summary=summary))
    marks = [step for step, _ in summary.progress()]
    if summary.steps:
        for i, (name, points) in enumerate(summary.series().items()):
            colour = (PLUM, ORANGE, BLUE, GREY)[i % 4]
            line = partial(_line, name=name, points=points, colour=colour, last=summary.steps)
            panels.append(partial(line, marks=marks if len(marks) <= MOST_MARKS else []))
    for name, lines in summary.swept().items():
        panels.append(partial(_swept, name=name, lines=lines))
    return panels[:MOST_PANELS]


def _plain(axis: Any) -> Any:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(GREY)
    axis.tick_params(color=GREY, labelcolor=INK, labelsize=8)
    axis.grid(True, color=PALE, linewidth=0.7)
    axis.set_axisbelow(True)
    return axis


def _title(axis: Any, title: str, xlabel: str) -> None:
    axis.set_title(title, loc="left", fontsize=10, color=INK, fontweight="bold")
    axis.set_xlabel(xlabel, fontsize=8, color=INK)


def _stairs(axis: Any, points: Points, last: int, **look: Any) -> None:
    steps = [0.0, *(step for step, _ in points), float(last)]
    values = [0.0, *(100 * value for _, value in points)]
    axis.step(steps, [*values, values[-1]], where="post", **look)


def _sparsity(axis: Any, summary: Summary) -> None:
    parts, points = summary.parts(), summary.progress()
    if 1 < len(parts) <= MOST_PARTS:
        for part, colour in zip(parts, (PLUM, ORANGE, BLUE, GREY, INK), strict=False):
            own = [(float(e["step"]), float(e["sparsity"])) for e in part]
            label = f"{part[-1]['pruner']}: {kinds(part[-1]['layers'])}"
            _stairs(axis, own, summary.steps, color=colour, linewidth=1.1, label=label)
    together = f"all {len(summary.rows)} layers" if len(parts) > 1 else "reached"
    _stairs(axis, points, summary.steps, color=GREEN, linewidth=1.9, label=together)
    aims = [(e["step"], 100 * e["target"]) for e in summary.prunes if e.get("target") is not None]
    if 0 < len(aims) <= MOST_MARKS:
        axis.plot(*zip(*aims, strict=True), "o", markerfacecolor="white", markeredgecolor=INK,
                  markeredgewidth=0.9, markersize=4.5, label="target",
                  clip_on=False, zorder=3)  # fmt: skip
    axis.set_ylim(0, 105)
    axis.set_yticks(range(0, 101, 20))
    axis.set_xlim(0, summary.steps)
    axis.legend(loc="lower right", fontsize=7.5, frameon=False, labelcolor=INK)
    axis.annotate(f"{100 * points[-1][1]:.1f} %", (summary.steps, 100 * points[-1][1]), (4, 0),
                  textcoords="offset points", va="center", fontsize=8.5, color=GREEN,
                  annotation_clip=False)  # fmt: skip
    _title(axis, "sparsity of the pruned layers, %", "optimizer step")


def _line(
    axis: Any, *, name: str, points: Points, colour: str, last: int, marks: list[float]
) -> None:
    for mark in marks:
        axis.axvline(mark, color=GREEN, linewidth=0.6, alpha=0.45)
    values = _drawable(points)
    axis.plot([step for step, _ in points], values, color=colour, linewidth=1.5,
              marker="o" if len(points) < 25 else None, markersize=3)  # fmt: skip
    axis.set_xlim(0, last)
    axis_name = "optimizer step; green: pruning" if marks else "optimizer step"
    _title(axis, name, axis_name + _left_out(values))


def _drawable(points: Points) -> list[float]:
    """The values, NaN in place of those that no axis can show."""
    return [value if abs(value) <= MOST else math.nan for _, value in points]


def _left_out(values: list[float]) -> str:
    count = sum(map(math.isnan, values))
    return f"; not drawn: {count} NaN, infinite or beyond 1e100" if count else ""


def _swept(axis: Any, *, name: str, lines: dict[str, Points]) -> None:
    looks = [(colour, mark) for mark in "os^D" for colour in (ORANGE, PLUM, BLUE, GREEN, GREY)]
    for (pruner, points), (colour, mark) in zip(lines.items(), cycle(looks), strict=False):
        spans = _over_seeds(points)
        axis.plot([100 * s for s, *_ in spans], [mean for _, _, mean, _ in spans],
                  f"{mark}-", color=colour, linewidth=1.5, markersize=4, label=pruner)  # fmt: skip
        wide = [(100 * s, low, high) for s, low, _, high in spans if high > low]
        axis.vlines(*zip(*wide, strict=True) if wide else ([], [], []), color=colour, linewidth=1)
    if len(lines) > 1:
        axis.legend(loc="best", fontsize=7.5, frameon=False, labelcolor=INK)
    values = [value for points in lines.values() for value in _drawable(points)]
    seeds = max(Counter(s for s, _ in points).most_common(1)[0][1] for points in lines.values())
    over = f"; means and ranges of {seeds} seeds" if seeds > 1 else ""
    _title(axis, f"{name}, in one shot", "sparsity, %" + over + _left_out(values))


def _over_seeds(points: Points) -> list[tuple[float, float, float, float]]:
    """Sparsity, and the lowest, the mean and the highest value there."""
    found: dict[float, list[float]] = {}
    for (sparsity, _), value in zip(points, _drawable(points), strict=True):
        found.setdefault(sparsity, []).append(value)
    return [(s, min(each), fmean(each), max(each)) for s, each in found.items()]


def _layers(axis: Any, bars: list[Bar], summary: Summary) -> None:
    where = range(len(bars))
    axis.barh(where, [100 * bar.sparsity for bar in bars], height=0.7, color=GREEN, alpha=0.85)
    spans = [(i, bar) for i, bar in enumerate(bars) if bar.high > bar.low]
    axis.hlines([i for i, _ in spans], [100 * bar.low for _, bar in spans],
                [100 * bar.high for _, bar in spans], color=INK, linewidth=1)  # fmt: skip
    axis.set_yticks(where, [bar.label for bar in bars], fontsize=7.5)
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(len(bars) - 0.4, -0.6)
    axis.set_xlim(0, 100)
    axis.grid(False, axis="y")
    together = 100 * (summary.sparsity or 0)
    axis.axvline(together, color=INK, linewidth=0.9, linestyle=(0, (3, 3)))
    who = f"{len(summary.rows)} layers" if spans else "each layer"
    title = f"sparsity of {who}" + ("" if summary.prunes else f" at {together:.0f} % in all")
    _title(axis, f"{title}, %", "dashed: all together" + ("; lines: range" if spans else ""))
