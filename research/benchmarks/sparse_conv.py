"""Sparse convolution on a CPU or GPU: ours in every dataflow, dense convolution, and spconv.

Scenes of surfaces (a floor, a wall, three spheres) on grids of 32^3, 64^3 and 96^3; random points,
the worst case, on 40^3 at rising density for the break-even with dense convolution; and the kernel
map of 100,000 points. 3x3x3, stride 1, median of --rounds, all sides in turn. spconv takes part if
it can be imported; its time includes its map, so that ours is shown with and without.

    python -m research.benchmarks.sparse_conv [--threads 1] [--device cuda --dtype float16]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from prunus import spatial
from prunus.hardware.plots import BLUE, GREEN, GREY, ORANGE, PLUM, figure, title

from research.benchmarks.measure import add_options, hardware, print_table, seconds

KERNEL, ONES = (3, 3, 3), (1, 1, 1)
COLOURS = dict(zip(spatial.DATAFLOWS, (GREEN, ORANGE, BLUE, PLUM), strict=True))
DENSITIES = (0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.55, 0.7)


def surfaces(size: int) -> Tensor:
    """(size, size, size) booleans: a floor, a wall and three spheres."""
    there = torch.zeros(size, size, size, dtype=torch.bool)
    there[:, :, 1] = there[1] = True
    places = torch.stack(torch.meshgrid(*[torch.arange(size)] * 3, indexing="ij"), -1) / size
    for centre, radius in (
        ((0.5, 0.5, 0.5), 0.25), ((0.3, 0.7, 0.4), 0.15), ((0.75, 0.3, 0.3), 0.2)
    ):  # fmt: skip
        distance = (places - torch.tensor(centre)).norm(dim=-1)
        there |= (distance - radius).abs() < 0.5 / size
    return there


class Case:
    """One grid with random features, its weights, and its dense twin."""

    def __init__(self, there: Tensor, channels: int, args: argparse.Namespace) -> None:
        dtype, device = getattr(torch, args.dtype), args.device
        place = there.nonzero()
        indices = torch.cat([torch.zeros(len(place), 1, dtype=torch.long), place], 1)
        self.shape, self.density = tuple(there.shape), float(there.float().mean())
        self.indices = indices.int().to(device)
        self.features = torch.randn(len(place), channels).to(device, dtype)
        self.weight = (torch.randn(channels, channels, *KERNEL) / channels).to(device, dtype)
        self.matrices = self.weight.flatten(2).permute(2, 1, 0).contiguous()
        self.map = self.make_map()
        self.map.table()
        self.dense_input = self.sparse().dense()

    def sparse(self) -> spatial.SparseTensor:
        return spatial.SparseTensor(self.features, self.indices, self.shape, 1)

    def make_map(self) -> spatial.KernelMap:
        return spatial.submanifold_map(self.indices, self.shape, 1, KERNEL, ONES)

    def dense(self) -> Tensor:
        return F.conv3d(self.dense_input, self.weight, padding=1)

    def run(self, flow: str) -> Tensor:
        return spatial.DATAFLOWS[flow](self.features, self.matrices, self.map)

    def check(self) -> None:
        expected = self.dense()[0][(slice(None), *self.indices[:, 1:].long().T)].T
        tolerance = 0.05 if self.features.dtype == torch.float16 else 1e-3
        for flow in spatial.DATAFLOWS:
            torch.testing.assert_close(self.run(flow), expected, rtol=tolerance, atol=tolerance)


def spconv_call(case: Case) -> Callable[[], Any] | None:
    try:
        import spconv.pytorch as spconv
    except ImportError:
        return None
    channels = case.features.shape[1]
    conv = spconv.SubMConv3d(channels, channels, 3, bias=False)
    conv = conv.to(case.features.device, case.features.dtype)
    conv.weight.data = case.weight.movedim(1, -1).contiguous()

    def run() -> Any:
        x = spconv.SparseConvTensor(case.features, case.indices, list(case.shape), 1)
        return conv(x)

    ours = case.run("gather_scatter")
    torch.testing.assert_close(run().features, ours, rtol=0.05, atol=0.05)
    return run


def medians(calls: dict[str, Callable[[], Any]], args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of each, the calls in turn in each round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(args.rounds + 1):
        for name, call in calls.items():
            taken = 1e3 * seconds(call, args)
            if round_:
                times[name].append(taken)
    return {name: statistics.median(values) for name, values in times.items()}


@torch.no_grad()
def scenes(args: argparse.Namespace) -> None:
    rows = []
    for size in (32, 64, 96):
        for channels in (32, 64):
            case = Case(surfaces(size), channels, args)
            case.check()
            calls: dict[str, Callable[[], Any]] = {"dense": case.dense, "map": case.make_map}
            calls |= {f: (lambda f=f, case=case: case.run(f)) for f in spatial.DATAFLOWS}
            theirs = spconv_call(case)
            if theirs is not None:
                calls["spconv"] = theirs
            ms = medians(calls, args)
            best = min(spatial.DATAFLOWS, key=lambda f: ms[f])
            products = case.map.count / (27 * size**3)
            with_map = ms[best] + ms["map"]
            rows.append((
                f"{size}^3, {channels}", f"{len(case.indices)}", f"{100 * case.density:.1f} %",
                f"{100 * products:.1f} %", f"{ms['map']:.1f}",
                *(f"{ms[f]:.1f}" for f in spatial.DATAFLOWS), f"{ms['dense']:.1f}",
                f"{ms['dense'] / ms[best]:.1f}x / {ms['dense'] / with_map:.1f}x",
                f"{ms['spconv']:.1f}, {ms['spconv'] / with_map:.2f}x" if theirs else "",
            ))  # fmt: skip
    header = ("grid, channels", "sites", "share", "products", "map ms", *spatial.DATAFLOWS,
              "dense", "over dense, without / with map", "spconv with map, to ours")  # fmt: skip
    print_table(header, rows)


@torch.no_grad()
def break_even(args: argparse.Namespace) -> None:
    lines: dict[str, list[float]] = {name: [] for name in ("dense", "map", *spatial.DATAFLOWS)}
    for density in DENSITIES:
        case = Case(torch.rand(40, 40, 40) < density, 32, args)
        calls: dict[str, Callable[[], Any]] = {"dense": case.dense, "map": case.make_map}
        calls |= {f: (lambda f=f, case=case: case.run(f)) for f in spatial.DATAFLOWS}
        for name, taken in medians(calls, args).items():
            lines[name].append(taken)
    percent = [f"{100 * d:.0f} %" for d in DENSITIES]
    print_table(("ms at density", *percent),
                [(name, *(f"{v:.1f}" for v in line)) for name, line in lines.items()])  # fmt: skip
    dense = statistics.median(lines["dense"])
    for flow in spatial.DATAFLOWS:
        total = [a + b for a, b in zip(lines[flow], lines["map"], strict=True)]
        print(f"{flow}: even with dense at {_crossing(total, dense)}")
    print()
    picture, (axis,) = figure(1, 6, 4)
    for flow, colour in COLOURS.items():
        total = [a + b for a, b in zip(lines[flow], lines["map"], strict=True)]
        axis.plot([100 * d for d in DENSITIES], total, "o-", color=colour, markersize=3, label=flow)
    axis.axhline(dense, color=GREY, linestyle=(0, (3, 3)), label="dense conv3d")
    axis.set_yscale("log")
    axis.legend(fontsize=8, frameon=False)
    title(axis, "3x3x3 on random points, map included", "% of 40^3 sites, 32 channels", "ms")
    args.output.mkdir(parents=True, exist_ok=True)
    picture.savefig(args.output / "break-even.png", dpi=110)


def _crossing(times: list[float], dense: float) -> str:
    for i, taken in enumerate(times):
        if taken > dense:
            if i == 0:
                return "no density"
            low, high = DENSITIES[i - 1], DENSITIES[i]
            share = (dense - times[i - 1]) / (taken - times[i - 1])
            return f"{100 * (low + share * (high - low)):.0f} %"
    return "none of these densities"


@torch.no_grad()
def maps(args: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(0)
    random = torch.randperm(128**3, generator=generator)[:100_000]
    grid = surfaces(170)
    rows = []
    for name, flat, size in (
        ("random in 128^3", random, 128),
        ("surfaces in 170^3", grid.flatten().nonzero().flatten()[:100_000], 170),
    ):
        place = torch.stack([flat // size**2, flat // size % size, flat % size], 1)
        indices = torch.cat([torch.zeros_like(place[:, :1]), place], 1).int().to(args.device)
        shape = (size,) * 3
        calls = {
            "submanifold": lambda i=indices, s=shape: spatial.submanifold_map(
                i, s, 1, KERNEL, ONES
            ),
            "strided": lambda i=indices, s=shape: spatial.strided_map(
                i, s, 1, KERNEL, (2, 2, 2), ONES, ONES
            ),
        }
        ms = medians(calls, args)
        rows.append((name, f"{len(flat)}", *(f"{v:.0f}" for v in ms.values())))
    print_table(("map of 3x3x3", "points", "submanifold ms", "stride 2 ms"), rows)


def grouping() -> None:
    """What adaptive grouping plans for a scene, and what it pads."""
    place = surfaces(64).nonzero()
    indices = torch.cat([torch.zeros_like(place[:, :1]), place], 1)
    sizes = spatial.submanifold_map(indices, (64, 64, 64), 1, KERNEL, ONES).sizes
    rows = []
    for epsilon in (0.0, 0.1, 0.2, 0.3, 0.5):
        groups = spatial.plan_groups(sizes, epsilon)
        padding = spatial.padding_share(groups, sizes)
        rows.append((f"{epsilon}", f"{len(groups)}", f"{100 * padding:.1f} %"))
    print_table(("epsilon", "products instead of 26", "padding"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_options(parser)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--output", type=Path, default=Path("docs/spatial"))
    args = parser.parse_args()
    print(hardware(args), "\n")
    torch.manual_seed(0)
    scenes(args)
    break_even(args)
    maps(args)
    grouping()


if __name__ == "__main__":
    main()
