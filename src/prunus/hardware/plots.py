"""Pictures of an estimate."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol

INK, GREY, PALE, GREEN, PLUM, ORANGE, BLUE = (
    "#222222", "#8a8a8a", "#e9e9e9", "#2f7d4f", "#7a3b69", "#c8702a", "#3b6a9c",
)  # fmt: skip
_MOST_BARS = 60


class Estimated(Protocol):
    """What a picture shows of an estimate."""

    @property
    def layers(self) -> Sequence[Any]: ...
    def total_bits(self, form: str) -> int: ...


def figure(columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A matplotlib Figure with plain axes side by side."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{error}; plots need: pip install 'prunus[report]'") from None
    result: Any = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(result)
    axes = list(result.subplots(1, columns, squeeze=False)[0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(GREY)
        axis.tick_params(color=GREY, labelcolor=INK, labelsize=8)
        axis.grid(True, color=PALE, linewidth=0.7)
        axis.set_axisbelow(True)
    return result, axes


def title(axis: Any, text: str, xlabel: str = "", ylabel: str = "") -> None:
    axis.set_title(text, loc="left", fontsize=10, color=INK, fontweight="bold")
    axis.set_xlabel(xlabel, fontsize=8, color=INK)
    axis.set_ylabel(ylabel, fontsize=8, color=INK)


def draw_estimate(estimate: Estimated, path: str | os.PathLike[str]) -> None:
    """Bytes by format on the left; multiplications and zeros of each layer beside them."""
    called = [layer for layer in estimate.layers if layer.macs][:_MOST_BARS]
    height = max(3.0, 0.22 * len(called) + 1.2)
    picture, (sizes, macs, zeros) = figure(3, 12, height)
    _sizes(sizes, estimate)
    names = [layer.name for layer in called]
    places = range(len(called))
    dense = [layer.macs / 1e6 for layer in called if layer.macs]
    macs.barh(places, dense, color=PALE, edgecolor=GREY, linewidth=0.5, label="dense")
    effective = [(layer.effective_macs or 0) / 1e6 for layer in called]
    macs.barh(places, effective, color=GREEN, height=0.5, label="effective")
    macs.legend(fontsize=7.5, frameon=False, loc="lower right",
                bbox_to_anchor=(1, 1), ncols=2)  # fmt: skip
    title(macs, "multiplications", "million a forward pass")
    weights = [100 * (1 - layer.density) for layer in called]
    inputs = [100 * (layer.input_sparsity or 0) for layer in called]
    zeros.barh([p - 0.2 for p in places], weights, height=0.38, color=BLUE, label="weights")
    zeros.barh([p + 0.2 for p in places], inputs, height=0.38, color=ORANGE, label="inputs")
    zeros.set_xlim(0, 100)
    zeros.legend(fontsize=7.5, frameon=False, loc="lower right",
                 bbox_to_anchor=(1, 1), ncols=2)  # fmt: skip
    title(zeros, "zeros", "%")
    for axis in (macs, zeros):
        axis.set_yticks(places, names if axis is macs else [""] * len(names), fontsize=7.5)
        axis.set_ylim(len(called) - 0.4, -0.6)
        axis.grid(False, axis="y")
    picture.savefig(path, dpi=150)


def _sizes(axis: Any, estimate: Estimated) -> None:
    forms = list(dict.fromkeys(form for layer in estimate.layers for form in layer.bits))
    fits = [all(form in layer.bits for layer in estimate.layers) for form in forms]
    kib = [estimate.total_bits(form) / 8192 for form in forms]
    colours = [
        GREY if form == "dense" else GREEN if fit else PALE
        for form, fit in zip(forms, fits, strict=True)
    ]
    axis.bar(range(len(forms)), kib, color=colours, edgecolor=GREY, linewidth=0.5)
    for i, size in enumerate(kib):
        axis.annotate(f"{size:.0f}", (i, size), (0, 2), textcoords="offset points",
                      ha="center", fontsize=7.5, color=INK)  # fmt: skip
    axis.set_xticks(range(len(forms)), forms, rotation=30, ha="right")
    axis.grid(False, axis="x")
    pale = "" if all(fits) else "pale: some layers stay dense"
    title(axis, "weights by format", pale, "KiB")
