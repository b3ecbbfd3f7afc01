"""Accuracy of the second-order methods in one shot, beside magnitude, over calibration seeds.

On the CIFAR ResNet-20 of `resnet20_cifar10.py`, and on the demo's vision transformer and a small
ResNet for digits, trained here. Four parts: ``sweep``, all methods over sparsities, with a plot;
``score``, where CAP's two scores take the weights from; ``check``, the points that a prototype
gave; ``push``, what buys most accuracy at 90 %, with its time.

    python -m research.benchmarks.second_order_accuracy [--parts sweep score check push] [--seeds 3]
        [--models resnet20 digits digits-resnet] [--weights FILE] [--data FILE] [--plot FILE]
        [--device cuda]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import prunus
from prunus import CAP, OBS, Calibration, FastCAP
from prunus.core.layers import Layer
from prunus.pruners import Pruner
from prunus.solvers.cholesky import inverse
from prunus.stats.block_fisher import BlockFisher, Blocks

from research import demo
from research.benchmarks.measure import add_options, hardware, print_table
from research.benchmarks.resnet20_cifar10 import SHARED, ResNet20, read_images, top1
from research.common import vision_models  # noqa: F401  (registers digits_resnet)

SPARSITIES = (0.3, 0.5, 0.6, 0.75, 0.9, 0.95)
cross_entropy = nn.functional.cross_entropy


@dataclass
class Task:
    """A trained model, data to calibrate on, data to evaluate on, and the layers to prune."""

    name: str
    model: nn.Module
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    layers: dict[str, Any]
    images: int
    """of a calibration set"""
    settings: Mapping[str, Any]
    """of the Fisher matrix in the sweep"""

    def calibration(self, seed: int, size: int = 8, images: int | None = None) -> Calibration:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.train[0]), generator=generator)[: images or self.images]
        x, y = self.train
        return Calibration([(x[i], y[i]) for i in order.split(size)], cross_entropy)

    def accuracy(self, model: nn.Module) -> float:
        return top1(model, *self.test)


def resnet20(args: argparse.Namespace) -> Task:
    model = ResNet20()
    model.load_state_dict(load_file(args.weights))
    train, test = (read_images(args.data, split) for split in ("train", "val"))
    layers = {"layers": ["Conv2d"], "exclude": ["conv1"]}
    return _task("resnet20", model, train, test, layers, 4096, args)


def digits(args: argparse.Namespace, build: Callable[[], nn.Module] = demo.build) -> Task:
    train, test = demo.digits()
    torch.manual_seed(0)
    model = build()
    demo.train_dense(model, train, 30)
    name = "digits" if build is demo.build else "digits-resnet"
    return _task(name, model, train, test, {}, 1437, args)


def digits_resnet(args: argparse.Namespace) -> Task:
    return digits(args, lambda: timm.create_model("digits_resnet"))


def _task(
    name: str, model: nn.Module, train: Any, test: Any, layers: Any, images: int, args: Any
) -> Task:
    train, test = ([t.to(args.device) for t in pair] for pair in (train, test))
    settings = {"num_grads": 512, "damp": DAMP[name]}
    return Task(name, model.to(args.device).eval(), train, test, layers, images, settings)


TASKS = {"resnet20": resnet20, "digits": digits, "digits-resnet": digits_resnet}
# the point to compare with; the default
DAMP = {"resnet20": 1e-7, "digits": 1e-8, "digits-resnet": 1e-8}
BEST_DAMP = {**DAMP, "resnet20": 1e-5}  # of the scan in `push`
OBS_DAMP = {"resnet20": 1e-3, "digits": 1e-7, "digits-resnet": 1e-7}


def methods(task: Task) -> dict[str, tuple[str | Pruner, str]]:
    """Name in the table -> pruner and allocator."""
    return {
        "magnitude": ("magnitude", "global"),
        "OBS": (OBS(num_grads=512, damp=OBS_DAMP[task.name]), "global"),
        "CAP": (CAP(**task.settings), "global"),
        "CAP, score: loss": (CAP(**task.settings, score="loss"), "global"),
        "CAP uniform": (CAP(**task.settings), "uniform"),
        "FastCAP": (FastCAP(num_grads=512), "uniform"),
    }


def spread(values: Sequence[float]) -> str:
    middle = f"{statistics.mean(values):.4f}"
    return middle if len(values) == 1 else f"{middle} ± {(max(values) - min(values)) / 2:.4f}"


def sweep(task: Task, args: argparse.Namespace) -> dict[str, dict[float, list[float]]]:
    """Method -> sparsity -> accuracy for each seed."""
    found: dict[str, dict[float, list[float]]] = {}
    for name, (pruner, allocator) in methods(task).items():
        table = found.setdefault(name, {s: [] for s in SPARSITIES})
        for seed in range(1 if pruner == "magnitude" else args.seeds):
            data = task.calibration(seed)
            result = prunus.sweep(
                task.model,
                pruner,
                SPARSITIES,
                task.accuracy,
                allocator=allocator,
                calibration=data,
                **task.layers,
            )
            for sparsity, metrics in result.values.items():
                table[sparsity].append(metrics["value"])
    print(f"{task.name}, dense {task.accuracy(task.model):.4f}, one shot, {args.seeds} seeds\n")
    rows = [(n, *(spread(v) for v in table.values())) for n, table in found.items()]
    print_table(("method", *(f"{s:g}" for s in SPARSITIES)), rows)
    return found


def score(task: Task, args: argparse.Namespace) -> None:
    """The sparsity of the layers with blocks of one length, at 90 %."""
    lengths: dict[str, dict[int, list[float]]] = {}
    for name in ("increase", "loss"):
        model, found = copy.deepcopy(task.model), lengths.setdefault(name, {})
        pruner = CAP(**task.settings, score=name)
        result = prunus.prune(
            model, pruner, sparsity=0.9, calibration=task.calibration(0), **task.layers
        )
        for mask in result.masks.values():
            shortest = min(
                mask[0].numel(), mask[0].numel() % pruner.block_size or pruner.block_size
            )
            found.setdefault(shortest, []).append(1 - mask.float().mean().item())
    header = sorted(lengths["loss"])
    rows = [(n, *(f"{statistics.mean(f[k]):.2f}" for k in header)) for n, f in lengths.items()]
    print(f"{task.name} at 0.9: sparsity of layers by the length of their shortest block\n")
    print_table(("score", *map(str, header)), rows)


def pruned(
    task: Task, pruner: Pruner, sparsity: float, data: Calibration, recalibrate: Any
) -> tuple[float, float, float]:
    """Accuracy, accuracy with norms estimated anew, seconds of pruning."""
    model = copy.deepcopy(task.model)
    begin = time.monotonic()
    prunus.prune(model, pruner, sparsity=sparsity, calibration=data, **task.layers)
    elapsed = time.monotonic() - begin
    plain = task.accuracy(model)
    prunus.prune(model, "magnitude", sparsity=sparsity, recalibrate=recalibrate, **task.layers)
    return plain, task.accuracy(model), elapsed


def check(task: Task, args: argparse.Namespace) -> None:
    """The points of a prototype at 90 %, whose score was the loss: fresh batches of 8 each time."""
    if task.name != "resnet20":
        return
    goals = {1: (0.526, 0.649), 2: (0.559, 0.674), 4: (0.649, 0.690), 8: (0.689, 0.712)}
    rows = []
    for stages, goal in goals.items():
        pruner = CAP(num_grads=512, damp=1e-7, num_recomputations=stages, score="loss")
        runs = [
            pruned(task, pruner, 0.9, task.calibration(seed, images=4096 * stages), larger)
            for seed in range(args.seeds)
            for larger in [task.calibration(seed, 64)]
        ]
        plain, mended, _ = zip(*runs, strict=True)
        rows.append((str(stages), spread(plain), str(goal[0]), spread(mended), str(goal[1])))
    header = ("recomputations", "top-1 at 0.9", "prototype", "recalibrated", "prototype")
    print_table(header, rows)


@dataclass(frozen=True)
class RelativeBlocks(Blocks):
    """Blocks damped by a share of their own mean diagonal."""

    def fisher(self) -> Tensor:
        f = super().fisher()
        diag = f.diagonal(dim1=1, dim2=2)
        diag.add_(1e-2 * diag.mean(1, keepdim=True))
        return f

    def inverse(self) -> Tensor:
        return inverse(self.fisher())


class RelativeFisher(BlockFisher):
    def per_block(self, function: Callable[..., Tensor], *matrices: Tensor) -> Tensor:
        def relative(blocks: Blocks, *parts: Tensor) -> Tensor:
            return function(RelativeBlocks(*vars(blocks).values()), *parts)

        return super().per_block(relative, *matrices)


@dataclass(frozen=True)
class RelativeCAP(CAP):
    """CAP with damp 1e-2 relative to the mean diagonal of each block."""

    def statistic(self, layer: Layer) -> BlockFisher:
        stat = super().statistic(layer)
        stat.__class__ = RelativeFisher
        return stat


Variant = tuple[Pruner, int]


def variants(task: Task) -> dict[str, Variant]:
    """What may buy accuracy: pruner and size of a calibration batch; the same images for all."""
    best, most = BEST_DAMP[task.name], task.images // 8

    def cap(size: int = 8, **changes: Any) -> Variant:
        return CAP(**{"num_grads": most, "damp": best, **changes}), size

    def obs(**changes: Any) -> Variant:
        return OBS(**{"num_grads": most, "damp": OBS_DAMP[task.name], **changes}), 8

    examples = {"samples": "example", "num_grads": task.images}
    quarter = {"num_recomputations": 4, "num_grads": most // 4}
    return {
        **{f"damp {damp:g}": cap(damp=damp) for damp in (1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4)},
        "damp 0.01 of each block's mean": (RelativeCAP(num_grads=most, damp=1e-12), 8),
        **{
            f"examples, damp {damp:g}": cap(64, damp=damp, **examples) for damp in (best, 10 * best)
        },
        "score: loss": cap(score="loss"),
        "damp 0.0001, score: loss": cap(damp=1e-4, score="loss"),
        "block 64": cap(block_size=64),
        "4 recomputations of a quarter of the gradients": cap(**quarter),
        "4 recomputations": cap(num_recomputations=4),
        "4 recomputations, score: loss": cap(num_recomputations=4, score="loss"),
        "4 recomputations, linear": cap(num_recomputations=4, ramp="linear"),
        "4 recomputations, examples": cap(64, num_recomputations=4, **examples),
        **{f"OBS, damp {damp:g}": obs(damp=damp) for damp in (1e-7, 1e-6, 1e-5, 1e-4, 1e-3)},
        f"OBS, damp {OBS_DAMP[task.name]:g}, 4 recomputations": obs(num_recomputations=4),
    }


def push(task: Task, args: argparse.Namespace) -> None:
    rows = []
    chosen = {name: v for name, v in variants(task).items() if args.variants in name}
    for name, (pruner, size) in chosen.items():
        runs = [
            pruned(task, pruner, 0.9, task.calibration(seed, size), task.calibration(seed, 64))
            for seed in range(args.seeds)
        ]
        plain, mended, times = zip(*runs, strict=True)
        rows.append((name, spread(plain), spread(mended), f"{statistics.median(times):.0f}"))
        print("  ".join(rows[-1]), file=sys.stderr, flush=True)
    base = f"CAP, damp {BEST_DAMP[task.name]:g} and one Fisher where not said otherwise"
    print(f"{task.name} at 0.9, {task.images} calibration images; {base}\n")
    print_table(("what", "top-1", "recalibrated", "s"), rows)


def plot(found: Mapping[str, Mapping[str, Mapping[float, Sequence[float]]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(found), 3.6), layout="constrained")
    axes = figure.subplots(1, len(found), squeeze=False)[0]
    for axis, (task, table) in zip(axes, found.items(), strict=True):
        for name, line in table.items():
            low, high = [min(v) for v in line.values()], [max(v) for v in line.values()]
            means = [statistics.mean(v) for v in line.values()]
            (drawn,) = axis.plot(list(line), means, marker="o", markersize=3, label=name)
            axis.fill_between(list(line), low, high, color=drawn.get_color(), alpha=0.2)
        axis.set(title=task, xlabel="sparsity", ylabel="accuracy")
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parts: dict[str, Callable[..., Any]] = {
        "sweep": sweep,
        "score": score,
        "check": check,
        "push": push,
    }
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_options(parser)
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--models", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", default="", help="of push, those with this in their name")
    parser.add_argument("--plot", type=Path, help="file for a picture of the sweep")
    weights = SHARED / "models" / "resnet20-cifar10-jpeg.safetensors"
    parser.add_argument("--weights", type=Path, default=weights)
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "cifar10-jpeg.tar.gz")
    args = parser.parse_args()
    print(hardware(args), "\n")
    found = {}
    for name in args.models:
        task = TASKS[name](args)
        for part in args.parts:
            result = parts[part](task, args)
            if part == "sweep":
                found[name] = result
    if args.plot and found:
        plot(found, args.plot)


if __name__ == "__main__":
    main()
