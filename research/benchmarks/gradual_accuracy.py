"""Pruning at once, with and without fine-tuning, and step by step, at the same cost of training.

Part ``methods``: accuracy of magnitude, OBS, CAP and FastCAP at 75 and 90 % in one shot, in one
shot and fine-tuned, and gradually, with wall times, and the curves of accuracy over training. Part
``ratio``: the sparsity that each way reaches before a point of accuracy is lost. A small
transformer and a small ResNet, trained here on digits; with ``--data FILE`` (a tar.gz of CIFAR-10
as an image folder) wider ones on CIFAR-10, for a GPU.

    python research/benchmarks/gradual_accuracy.py [--parts methods ratio] [--seeds 3]
        [--models vit resnet] [--epochs 20] [--plot FOLDER] [--data FILE] [--device cuda] [--quick]

All that trains after pruning trains for as many epochs, with the same optimizer and the same
learning rate: a cosine from ``lr`` down. One-shot pruning is pruned after the first step; gradual
pruning goes cubically from 30 % to the target in seven steps over the first 60 % of training.
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
from torch import Tensor, nn

import prunus
from prunus import CAP, OBS, Calibration, FastCAP, Magnitude
from prunus.modifiers import LearningRate
from prunus.pruners import Pruner
from prunus.schedules import Schedule
from prunus.timing import Window

from common import add_options, hardware, print_table, seconds
from resnet20_cifar10 import read_images

sys.path.append(str(Path(__file__).parent.parent))
import demo

import vision_models  # noqa: F401  (registers digits_vit and digits_resnet)

TARGETS = (0.75, 0.9)
RATIOS = (0.8, 0.9, 0.95, 0.97, 0.98, 0.99)
GRADUAL = Window("0%", "60%", "10%")
WAYS = ("one shot", "one shot + fine-tune", "gradual")
cross_entropy = nn.functional.cross_entropy
Curve = list[float]


@dataclass
class Task:
    """A dense model, its data on its device, and how it is trained."""

    name: str
    model: nn.Module
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    batch_size: int
    lr: float
    shift: int
    """images are flipped and moved by up to so many pixels while training; 0: left as they are"""
    num_grads: int

    def top1(self, model: nn.Module) -> float:
        """In percent."""
        x, y = self.test
        model.eval()
        with torch.no_grad():
            hits = [
                (model(a).argmax(1) == b).sum()
                for a, b in zip(x.split(500), y.split(500), strict=True)
            ]
        return 100 * int(torch.stack(hits).sum()) / len(y)

    def calibration(self, seed: int) -> Calibration:
        x, y = self.train
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed)).to(y.device)
        return Calibration([(x[i], y[i]) for i in order[:4096].split(8)], cross_entropy)

    def epoch(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        x, y = self.train
        order = torch.randperm(len(y), device=y.device)
        for i in order[: len(order) // self.batch_size * self.batch_size].split(self.batch_size):
            images = changed(x[i], self.shift) if self.shift else x[i]
            cross_entropy(model.train()(images), y[i]).backward()
            optimizer.step()
            optimizer.zero_grad()


def changed(x: Tensor, shift: int) -> Tensor:
    """Half of the images flipped, all moved together by up to `shift` pixels."""
    flip = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
    moves = torch.randint(-shift, shift + 1, (2,)).tolist()
    return torch.where(flip, x.flip(3), x).roll(moves, (2, 3))


def build(name: str, args: argparse.Namespace) -> Task:
    torch.manual_seed(0)
    if args.data is None:
        train, test = demo.digits()
        model, batch_size, shift, lr = timm.create_model(f"digits_{name}"), 64, 0, 1e-3
    else:
        train, test = (read_images(args.data, split) for split in ("train", "val"))
        batch_size, shift, lr = 256, 4, 1e-3
        shape: dict[str, Any] = {"in_chans": 3, "num_classes": 10}
        if name == "vit":
            shape |= {"img_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 9, "num_heads": 3}
        else:
            shape |= {"channels": (64, 128, 256)}
        model = timm.create_model(f"digits_{name}", **shape)
    train, test = ([t.to(args.device) for t in pair] for pair in (train, test))
    task = Task(name, model.to(args.device), train, test, batch_size, lr, shift, args.num_grads)
    train_dense(task, args.dense_epochs)
    return task


def train_dense(task: Task, epochs: int) -> None:
    optimizer = torch.optim.AdamW(task.model.parameters(), weight_decay=0.05)
    steps = len(task.train[1]) // task.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps * epochs, pct_start=0.2)
    optimizer.register_step_post_hook(lambda *_: schedule.step())
    for _ in range(epochs):
        task.epoch(task.model, optimizer)


def pruners(task: Task) -> dict[str, Pruner]:
    return {
        "magnitude": Magnitude(),
        "OBS": OBS(num_grads=task.num_grads, damp=1e-5),
        "CAP": CAP(num_grads=task.num_grads, damp=1e-6),
        "FastCAP": FastCAP(num_grads=task.num_grads),
    }


def recipe(pruner: Pruner, target: float, gradual: bool, lr: float) -> prunus.Recipe:
    sparsity = Schedule(from_=0.3, to=target, curve="cubic") if gradual else target
    window = GRADUAL if gradual else None
    rate = LearningRate(from_=lr, to=lr / 100, curve="cosine")
    return prunus.Recipe((prunus.PruningModifier(pruner, sparsity, window=window), rate))


def trained(
    task: Task, pruner: Pruner, target: float, gradual: bool, epochs: int, seed: int
) -> Curve:
    """Accuracy after each epoch of a run that ends pruned to the target."""
    torch.manual_seed(seed)
    model = copy.deepcopy(task.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.lr, weight_decay=0.05)
    curve = []
    with prunus.attach(
        model,
        optimizer,
        recipe(pruner, target, gradual, task.lr),
        steps_per_epoch=len(task.train[1]) // task.batch_size,
        epochs=epochs,
        calibration=task.calibration(seed),
    ) as session:
        for _ in range(epochs):
            task.epoch(model, optimizer)
            curve.append(task.top1(model))
    assert abs(session.sparsity - target) < 1e-3
    return curve


def at_once(task: Task, pruner: Pruner, target: float, seed: int) -> Curve:
    model = copy.deepcopy(task.model)
    prunus.prune(model, pruner, sparsity=target, calibration=task.calibration(seed))
    return [task.top1(model)]


def run(
    task: Task, way: str, pruner: Pruner, target: float, args: argparse.Namespace
) -> tuple[list[Curve], float]:
    """A curve for each seed, and the median time."""
    curves: list[Curve] = []
    times = []
    # magnitude in one shot has nothing random in it
    for seed in range(1 if way == "one shot" and isinstance(pruner, Magnitude) else args.seeds):

        def once(seed: int = seed) -> None:
            if way == "one shot":
                curves.append(at_once(task, pruner, target, seed))
            else:
                gradual = way == "gradual"
                curves.append(trained(task, pruner, target, gradual, args.epochs, seed))

        times.append(seconds(once, args))
    last = [curve[-1] for curve in curves]
    print(f"{task.name} {way} {pruner.name} {target:g}: {last}", file=sys.stderr, flush=True)
    return curves, statistics.median(times)


def said(curves: Sequence[Curve]) -> str:
    last = [curve[-1] for curve in curves]
    if len(last) == 1:
        return f"{last[0]:.2f}"
    return f"{statistics.mean(last):.2f} ± {(max(last) - min(last)) / 2:.2f}"


def methods(task: Task, args: argparse.Namespace) -> None:
    begun = time.strftime("%H:%M")
    found = {
        (name, way, target): run(task, way, pruner, target, args)
        for name, pruner in pruners(task).items()
        for target in args.targets
        for way in WAYS
    }
    print(f"{task.name}: dense {task.top1(task.model):.2f} %, {args.epochs} epochs ({begun})\n")
    rows = [
        (name, f"{target:g}", *(said(found[name, w, target][0]) for w in WAYS),
         *(f"{found[name, w, target][1]:.0f}" for w in WAYS))
        for name in pruners(task)
        for target in args.targets
    ]  # fmt: skip
    print_table(("method", "sparsity", *WAYS, *(f"{way}, s" for way in WAYS)), rows)
    if args.plot:
        plot(task, {key: curves for key, (curves, _) in found.items()}, args)


def plot(task: Task, found: Mapping[Any, Sequence[Curve]], args: argparse.Namespace) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(args.targets), 3.6), layout="constrained")
    axes = figure.subplots(1, len(args.targets), squeeze=False)[0]
    for axis, target in zip(axes, args.targets, strict=True):
        for i, name in enumerate(pruners(task)):
            for way, style in ((WAYS[1], "--"), (WAYS[2], "-")):
                means = [
                    statistics.mean(points)
                    for points in zip(*found[name, way, target], strict=True)
                ]
                label = name if way == WAYS[2] else None
                axis.plot(range(1, len(means) + 1), means, style, color=f"C{i}", label=label)
        axis.axhline(task.top1(task.model), color="gray", linewidth=0.8)
        lowest = min(c[-1] for k, curves in found.items() if k[1] != WAYS[0] for c in curves)
        axis.set(title=f"{task.name}, {target:.0%}", xlabel="epoch", ylabel="top-1, %")
        axis.set_ylim(bottom=lowest - 10)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False, title="gradual (at once: dashed)")
    Path(args.plot).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(args.plot) / f"gradual-{task.name}.png", dpi=150)


def reached(means: Mapping[float, float], least: float) -> str:
    """The sparsity at which accuracy falls below `least`, between the measured ones by a line."""
    before = (0.0, None)
    for sparsity, value in means.items():
        if value < least:
            if before[1] is None:
                return f"< {sparsity:g}"
            share = (before[1] - least) / (before[1] - value)
            return f"{before[0] + share * (sparsity - before[0]):.3f}"
        before = (sparsity, value)
    return f"> {before[0]:g}"


def ratio(task: Task, args: argparse.Namespace) -> None:
    """How sparse, for a point of accuracy: in small steps, or in one aggressive one."""
    dense = task.top1(task.model)
    rows = []
    for name in ("magnitude", "CAP"):
        for way in WAYS:
            means = {}
            for target in args.ratios:
                curves, _ = run(task, way, pruners(task)[name], target, args)
                means[target] = statistics.mean(curve[-1] for curve in curves)
            values = [f"{value:.2f}" for value in means.values()]
            rows.append((name, way, *values, reached(means, dense - 1)))
    print(f"{task.name}: dense {dense:.2f} %, {args.epochs} epochs, {args.seeds} seeds\n")
    print_table(("method", "way", *(f"{r:g}" for r in args.ratios), "at one point lost"), rows)


def main() -> None:
    parts: dict[str, Callable[..., None]] = {"methods": methods, "ratio": ratio}
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_options(parser)
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--models", nargs="+", choices=("vit", "resnet"), default=["vit", "resnet"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--epochs", type=int, default=20, help="of training after the dense model's"
    )
    parser.add_argument("--num-grads", type=int, default=180, help="of batches of eight")
    parser.add_argument("--dense-epochs", type=int, default=30)
    parser.add_argument("--targets", nargs="+", type=float, default=list(TARGETS))
    parser.add_argument("--ratios", nargs="+", type=float, default=list(RATIOS))
    parser.add_argument("--plot", help="folder for pictures of the curves")
    parser.add_argument("--data", type=Path, help="CIFAR-10 as tar.gz of an image folder")
    parser.add_argument("--quick", action="store_true", help="to see that it runs")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.epochs, args.dense_epochs, args.num_grads = 1, 2, 2, 8
        args.targets, args.ratios = [0.9], [0.8, 0.9]
    print(hardware(args), "\n")
    for name in args.models:
        task = build(name, args)
        for part in args.parts:
            parts[part](task, args)


if __name__ == "__main__":
    main()
