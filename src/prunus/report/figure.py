"""The picture of a run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from prunus.report.summary import Summary

INK, GREY, GREEN, PLUM, ORANGE = "#222222", "#8a8a8a", "#2f7d4f", "#7a3b69", "#c8702a"
MOST_BARS = 60


def draw(summary: Summary) -> Any:
    """A matplotlib Figure: on the left what changes over time, on the right the layers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _panels(summary)
    bars = len(summary.layers) if 0 < len(summary.layers) <= MOST_BARS else 0
    height = max(2.3 * max(1, len(panels)), 0.21 * bars + 1.0, 2.6)
    wide = bool(summary.layers) and bool(panels)
    figure = Figure(figsize=(10 if wide else 6.5, height), layout="constrained")
    FigureCanvasAgg(figure)
    columns: Any = [figure, figure]
    if wide:
        columns = figure.subfigures(1, 2, width_ratios=[1.15, 1])
    if panels:
        axes = columns[0].subplots(len(panels), 1, squeeze=False)[:, 0]
        for axis, panel in zip(axes, panels, strict=True):
            _plain(axis)
            panel(axis)
    if summary.layers:
        axis = columns[1].subplots()
        _plain(axis)
        _layers(axis, summary)
    return figure


def _panels(summary: Summary) -> list[Callable[[Any], None]]:
    panels: list[Callable[[Any], None]] = []
    if summary.prunes and summary.steps:
        panels.append(lambda axis: _sparsity(axis, summary))
    if summary.steps:
        for i, (name, values) in enumerate(list(summary.series().items())[:4]):
            colour = (PLUM, ORANGE, GREY, INK)[i]
            panels.append(functools.partial(_line, name=name, values=values, colour=colour))
    for name, points in list(summary.swept().items())[:3]:
        panels.append(functools.partial(_swept, name=name, values=points))
    return panels


def _plain(axis: Any) -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(GREY)
    axis.tick_params(colors=INK, labelsize=8)
    axis.grid(True, color="#e9e9e9", linewidth=0.7)
    axis.set_axisbelow(True)


def _title(axis: Any, title: str, xlabel: str) -> None:
    axis.set_title(title, loc="left", fontsize=10, color=INK, fontweight="bold")
    axis.set_xlabel(xlabel, fontsize=8, color=INK)


def _sparsity(axis: Any, summary: Summary) -> None:
    steps = [0, *(e["step"] for e in summary.prunes), summary.steps]
    values = [0.0, *(100 * e["sparsity"] for e in summary.prunes)]
    axis.step(steps, [*values, values[-1]], where="post", color=GREEN, linewidth=1.8)
    axis.plot(steps[1:-1], values[1:], "o", color=GREEN, markersize=4)
    axis.set_ylim(0, 100)
    last = f"{values[-1]:.1f} %"
    axis.annotate(last, (steps[-1], values[-1]), (-2, -5), textcoords="offset points",
                  ha="right", va="top", fontsize=9, color=GREEN)  # fmt: skip
    _title(axis, "sparsity of the pruned layers, %", "optimizer step")


def _line(axis: Any, *, name: str, values: list[tuple[int, float]], colour: str) -> None:
    axis.plot(*zip(*values, strict=True), color=colour, linewidth=1.5,
              marker="o" if len(values) < 3 else None, markersize=4)  # fmt: skip
    axis.set_xlim(left=0)
    _title(axis, name, "optimizer step")


def _swept(axis: Any, *, name: str, values: list[tuple[float, float]]) -> None:
    axis.plot([100 * s for s, _ in values], [v for _, v in values], "o-", color=ORANGE,
              linewidth=1.5, markersize=4)  # fmt: skip
    _title(axis, f"{name}, in one shot", "sparsity, %")


def _layers(axis: Any, summary: Summary) -> None:
    values = [100 * s for s in summary.layers.values()]
    if len(values) > MOST_BARS:
        axis.hist(values, bins=40, range=(0, 100), color=GREEN)
        axis.set_ylabel("layers", fontsize=8)
        _title(axis, f"sparsity of {len(values)} layers, %", "sparsity, %")
        return
    names = [name if len(name) <= 34 else f"…{name[-33:]}" for name in summary.layers]
    where = range(len(values))
    axis.barh(where, values, height=0.7, color=GREEN)
    axis.set_yticks(where, names, fontsize=7.5)
    axis.invert_yaxis()
    axis.set_ylim(len(values) - 0.4, -0.6)
    axis.set_xlim(0, 100)
    axis.grid(False, axis="y")
    if summary.sparsity is not None:
        axis.axvline(100 * summary.sparsity, color=INK, linewidth=0.9, linestyle=(0, (3, 3)))
    _title(axis, "sparsity of each layer, %", "dashed: all of them together")
