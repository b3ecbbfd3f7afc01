"""EIE's figures from real runs: FIFO depth, index width, scaling, load balance, row order.

The nine layers of the paper with random weights and activations of the published densities; and a
layer of a network that was really pruned, the demo's transformer, where rows differ. Prints the
tables of `docs/hardware.md` and draws its pictures. Needs no data.

    python -m research.benchmarks.eie_figures [--output docs/hardware]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from prunus import formats
from prunus import hardware as models
from prunus.hardware.energy import EventEnergy, eie_energy
from prunus.hardware.plots import BLUE, GREEN, GREY, INK, ORANGE, PLUM, figure, title
from prunus.hardware.published import LAYERS, Layer

from research.benchmarks.measure import add_options, hardware, print_table

COLOURS = (GREEN, PLUM, ORANGE, BLUE, INK, GREY, "#b8a13a", "#4aa3a3", "#a33b3b")
QUEUES, WIDTHS = (2, 3, 5, 8, 16, 32, 64), (2, 3, 4, 5, 6, 8)
ELEMENTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
Case = tuple[Layer, formats.Mask, formats.Mask]


def table(cases: list[Case]) -> None:
    reference = models.run(models.Machine(), *cases[1][1:])
    events = EventEnergy.calibrated(reference)
    rows = []
    for layer, mask, active in cases:
        r = models.run(models.Machine(), mask, active)
        rows.append((
            layer.name, f"{layer.inputs}x{layer.outputs}",
            f"{layer.ideal:.1f} / {1e6 * r.ideal_seconds:.1f}",
            f"{layer.actual:.1f} / {1e6 * r.seconds:.1f}",
            f"{100 * (1e6 * r.seconds / layer.actual - 1):+.0f} %",
            f"{100 * (1 - r.real_work):.0f} %", f"{r.load_balance:.2f}",
            f"{1e6 * eie_energy(r):.2f} / {1e6 * events.joules(r):.2f}",
        ))  # fmt: skip
    header = ("layer", "size", "ideal µs, paper / model", "µs, paper / model", "off",
              "virtual zeros", "load balance", "µJ by power / by events")  # fmt: skip
    print_table(header, rows)


def fifo(axis: Any, cases: list[Case]) -> None:
    rows = []
    for (layer, mask, active), colour in zip(cases, COLOURS, strict=True):
        runs = [models.run(models.Machine(queue=q), mask, active) for q in QUEUES]
        balance = [r.load_balance for r in runs]
        axis.plot(QUEUES, balance, "o-", color=colour, markersize=3, label=layer.name)
        rows.append((layer.name, *(f"{b:.2f}" for b in balance)))
    axis.axvline(8, color=GREY, linewidth=0.8, linestyle=(0, (3, 3)))
    axis.set_xscale("log", base=2)
    axis.set_xticks(QUEUES, map(str, QUEUES))
    axis.set_ylim(0, 1.02)
    axis.legend(fontsize=7, frameon=False, ncols=2, loc="lower right")
    title(axis, "load balance by FIFO depth, 64 elements", "depth (dashed: the paper's 8)")
    print_table(("load balance at FIFO depth", *map(str, QUEUES)), rows)


def widths(axis: Any, cases: list[Case]) -> None:
    """Bits that a layer's entries take, for each width of the relative index."""
    rows = []
    for (layer, mask, _), colour in zip(cases, COLOURS, strict=True):
        bits = [(4 + k) * formats.entry_counts(mask, 64, k).sum() / mask.sum() for k in WIDTHS]
        axis.plot(WIDTHS, bits, "o-", color=colour, markersize=3, label=layer.name)
        rows.append((layer.name, *(f"{b:.1f}" for b in bits)))
    axis.set_ylim(0, 30)
    axis.legend(fontsize=7, frameon=False, ncols=2)
    title(axis, "bits a nonzero weight by index width", "bits of the relative index")
    print_table(("bits a nonzero weight at index bits", *map(str, WIDTHS)), rows)


def scaling(left: Any, right: Any, cases: list[Case]) -> None:
    rows = []
    for (layer, mask, active), colour in zip(cases, COLOURS, strict=True):
        runs = [models.run(models.Machine(p), mask, active) for p in ELEMENTS]
        speed = [runs[0].cycles / r.cycles for r in runs]
        left.plot(ELEMENTS, speed, "o-", color=colour, markersize=3, label=layer.name)
        right.plot(ELEMENTS, [r.real_work for r in runs], "o-", color=colour, markersize=3)
        shown = [f"{s:.0f}x" for s in speed[-3:]]
        rows.append((layer.name, *shown, f"{runs[-3].load_balance:.2f}",
                     f"{runs[-1].load_balance:.2f}"))  # fmt: skip
    left.plot(ELEMENTS, ELEMENTS, color=GREY, linewidth=0.8, linestyle=(0, (3, 3)))
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks(ELEMENTS, map(str, ELEMENTS))
    left.set_yscale("log", base=2)
    left.legend(fontsize=7, frameon=False, ncols=2)
    right.set_ylim(0, 1.02)
    title(left, "speed-up over one element", "elements (dashed: linear)")
    title(right, "share of entries that are no virtual zeros", "elements")
    header = ("speed-up at elements", "64", "128", "256", "load balance at 64", "at 256")
    print_table(header, rows)


def row_order(axis: Any) -> None:
    """Layers whose rows differ as those of pruned networks do: densities follow a log-normal."""
    rows, spreads = [], (0.0, 0.25, 0.5, 0.75, 1.0)
    lines: dict[str, list[float]] = {"as it comes": [], "sorted, to and fro": []}
    for spread in spreads:
        rng = np.random.default_rng(0)
        density = np.clip(0.1 * np.exp(spread * rng.standard_normal((4096, 1))), 0, 1)
        mask, active = rng.random((4096, 4096)) < density, rng.random(4096) < 0.35
        orders = (np.arange(4096), models.snake_order(mask, 64))
        runs = [models.run(models.Machine(), mask[order], active) for order in orders]
        for line, r in zip(lines.values(), runs, strict=True):
            line.append(r.load_balance)
        rows.append((f"{spread}", *(f"{r.cycles}" for r in runs),
                     *(f"{r.load_balance:.3f}" for r in runs)))  # fmt: skip
    for (name, line), colour in zip(lines.items(), (GREY, GREEN), strict=True):
        axis.plot(spreads, line, "o-", color=colour, markersize=4, label=name)
    axis.set_ylim(0.5, 1.02)
    axis.legend(fontsize=8, frameon=False, loc="lower left")
    title(axis, "load balance by how much rows differ", "standard deviation of log density")
    header = ("spread of rows", "cycles", "sorted", "load balance", "sorted")
    print_table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_options(parser)
    parser.add_argument("--output", type=Path, default=Path("docs/hardware"))
    args = parser.parse_args()
    print(hardware(args), "\n")
    args.output.mkdir(parents=True, exist_ok=True)
    cases = [(layer, *layer.random()) for layer in LAYERS]
    begin = time.perf_counter()
    table(cases)
    picture, axes = figure(3, 13, 4)
    fifo(axes[0], cases)
    widths(axes[1], cases)
    row_order(axes[2])
    picture.savefig(args.output / "eie-queues.png", dpi=110)
    picture, axes = figure(2, 10, 4)
    scaling(*axes, cases)
    picture.savefig(args.output / "eie-scaling.png", dpi=110)
    rng = np.random.default_rng(0)
    mask, active = rng.random((4096, 4096)) < 0.09, rng.random(4096) < 0.35
    once = time.perf_counter()
    models.run(models.Machine(), mask, active)
    now = time.perf_counter()
    print(
        f"one 4096x4096 layer on 64 elements: {now - once:.2f} s; all of this: {now - begin:.0f} s"
    )


if __name__ == "__main__":
    main()
