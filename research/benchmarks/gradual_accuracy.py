"""Pruning at once, with and without fine-tuning, and step by step, at the same cost of training.

Part ``methods``: accuracy of magnitude, OBS, CAP and FastCAP at 75 and 90 % in one shot, in one
shot and fine-tuned, and gradually, with wall times, and the curves of accuracy over training. Part
``ratio``: the sparsity that each way reaches before a point of accuracy is lost. A small
transformer and a small ResNet, trained here on digits; with ``--data FILE`` (a tar.gz of CIFAR-10
as an image folder) wider ones on CIFAR-10, for a GPU.

    python -m research.benchmarks.gradual_accuracy [--parts methods ratio] [--seeds 3]
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
from prunus.modifiers.schedules import Schedule
from prunus.modifiers.timing import Window
from prunus.pruners import Pruner

from research import demo
from research.benchmarks.measure import add_options, hardware, print_table, seconds
from research.benchmarks.resnet20_cifar10 import read_images
from research.common import vision_models  # noqa: F401  (registers digits_vit and digits_resnet)

TARGETS = (0.75, 0.9)
RATIOS = (0.8, 0.9, 0.95, 0.97, 0.98, 0.99)
GRADUAL = Window("0%", "60%", "10%")
FOLDS = 5
WAYS = ("one shot", "one shot + fine-tune", "gradual")
cross_entropy = nn.functional.cross_entropy
Curve = list[float]


@dataclass
class Task:
    """A dense model, its data on its device, and how it is trained."""

    name: str
    seed: int
    model: nn.Module
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    batch_size: int
    lr: float
    shift: int
    """images are flipped and moved by up to so many pixels while training; 0: left as they are"""
    num_grads: int
    dense: float = 0.0
    """accuracy before pruning"""

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

    def calibration(self, batch_size: int = 8) -> Calibration:
        x, y = self.train
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(self.seed))
        batches = order[:4096].to(y.device).split(batch_size)
        return Calibration([(x[i], y[i]) for i in batches], cross_entropy)

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


def build(name: str, seed: int, args: argparse.Namespace) -> Task:
    torch.manual_seed(seed)
    if args.data is None:
        train, test = demo.digits(seed % FOLDS)
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
    task = Task(
        name, seed, model.to(args.device), train, test, batch_size, lr, shift, args.num_grads
    )
    train_dense(task, args.dense_epochs)
    task.dense = task.top1(task.model)
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
        "OBS": OBS(num_grads=task.num_grads, damp=1e-7),
        "CAP": CAP(num_grads=task.num_grads),
        "FastCAP": FastCAP(num_grads=task.num_grads),
    }


def recipe(pruner: Pruner, target: float, gradual: bool, lr: float) -> prunus.Recipe:
    sparsity = Schedule(from_=0.3, to=target, curve="cubic") if gradual else target
    window = GRADUAL if gradual else None
    rate = LearningRate(from_=lr, to=lr / 100, curve="cosine")
    return prunus.Recipe((prunus.PruningModifier(pruner, sparsity, window=window), rate))


def trained(task: Task, pruner: Pruner, target: float, gradual: bool, epochs: int) -> Curve:
    """Accuracy after each epoch of a run that ends pruned to the target."""
    torch.manual_seed(task.seed)
    model = copy.deepcopy(task.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.lr, weight_decay=0.05)
    curve = []
    with prunus.attach(
        model,
        optimizer,
        recipe(pruner, target, gradual, task.lr),
        steps_per_epoch=len(task.train[1]) // task.batch_size,
        epochs=epochs,
        calibration=task.calibration(),
    ) as session:
        for _ in range(epochs):
            task.epoch(model, optimizer)
            curve.append(task.top1(model))
    assert abs(session.sparsity - target) < 1e-3
    return curve


def at_once(task: Task, pruner: Pruner, target: float) -> Curve:
    model = copy.deepcopy(task.model)
    data, fresh = task.calibration(), task.calibration(64)
    prunus.prune(model, pruner, sparsity=target, calibration=data, recalibrate=fresh)
    return [task.top1(model)]


@dataclass
class Found:
    """What one way of pruning came to, for each seed."""

    curves: list[Curve]
    lost: list[float]
    seconds: float

    def __str__(self) -> str:
        mean = statistics.mean(curve[-1] for curve in self.curves)
        if len(self.lost) == 1:
            return f"{mean:.2f} ({-self.lost[0]:+.2f})"
        error = statistics.stdev(self.lost) / len(self.lost) ** 0.5
        return f"{mean:.2f} ({-statistics.mean(self.lost):+.2f} ± {error:.2f})"


def run(
    tasks: Sequence[Task], way: str, pruner: Pruner, target: float, args: argparse.Namespace
) -> Found:
    curves: list[Curve] = []
    times = []
    for task in tasks:

        def once(task: Task = task) -> None:
            if way == "one shot":
                curves.append(at_once(task, pruner, target))
            else:
                curves.append(trained(task, pruner, target, way == "gradual", args.epochs))

        times.append(seconds(once, args))
    lost = [task.dense - curve[-1] for task, curve in zip(tasks, curves, strict=True)]
    found = Found(curves, lost, statistics.median(times))
    print(f"{tasks[0].name} {way} {pruner.name} {target:g}: {found}", file=sys.stderr, flush=True)
    return found


def heading(tasks: Sequence[Task], args: argparse.Namespace, begun: str) -> str:
    dense = statistics.mean(task.dense for task in tasks)
    what = f"dense {dense:.2f} %, {args.epochs} epochs, {len(tasks)} seeds"
    return f"{tasks[0].name}: {what} ({begun}-{time.strftime('%H:%M')})"


def methods(tasks: Sequence[Task], args: argparse.Namespace) -> None:
    begun = time.strftime("%H:%M")
    found = {
        (name, way, target): run(tasks, way, pruner, target, args)
        for name, pruner in pruners(tasks[0]).items()
        for target in args.targets
        for way in WAYS
    }
    print(heading(tasks, args, begun), "\n")
    rows = [
        (name, f"{target:g}", *(str(found[name, w, target]) for w in WAYS),
         *(f"{found[name, w, target].seconds:.0f}" for w in WAYS))
        for name in pruners(tasks[0])
        for target in args.targets
    ]  # fmt: skip
    print_table(("method", "sparsity", *WAYS, *(f"{way}, s" for way in WAYS)), rows)
    if args.plot:
        plot(tasks, found, args)


def plot(tasks: Sequence[Task], found: Mapping[Any, Found], args: argparse.Namespace) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(args.targets), 3.6), layout="constrained")
    axes = figure.subplots(1, len(args.targets), squeeze=False)[0]
    lowest = min(c[-1] for k, f in found.items() if k[1] != WAYS[0] for c in f.curves)
    for axis, target in zip(axes, args.targets, strict=True):
        for i, name in enumerate(pruners(tasks[0])):
            for way, style in ((WAYS[1], "--"), (WAYS[2], "-")):
                curves = found[name, way, target].curves
                means = [statistics.mean(points) for points in zip(*curves, strict=True)]
                label = name if way == WAYS[2] else None
                axis.plot(range(1, len(means) + 1), means, style, color=f"C{i}", label=label)
        axis.axhline(statistics.mean(task.dense for task in tasks), color="gray", linewidth=0.8)
        axis.set(title=f"{tasks[0].name}, {target:.0%}", xlabel="epoch", ylabel="top-1, %")
        axis.set_ylim(bottom=lowest - 10)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False, title="gradual (at once: dashed)")
    Path(args.plot).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(args.plot) / f"gradual-{tasks[0].name}.png", dpi=150)


def reached(lost: Mapping[float, float], most: float = 1.0) -> str:
    """The sparsity that loses more than `most` points, between the measured ones by a line."""
    before: tuple[float, float] | None = None
    for sparsity, points in lost.items():
        if points > most:
            if before is None:
                return f"< {sparsity:g}"
            share = (most - before[1]) / (points - before[1])
            return f"{before[0] + share * (sparsity - before[0]):.3f}"
        before = (sparsity, points)
    return f"> {max(lost):g}"


def ratio(tasks: Sequence[Task], args: argparse.Namespace) -> None:
    """How sparse, for a point of accuracy: in small steps, or in one aggressive one."""
    begun = time.strftime("%H:%M")
    rows = []
    for name in ("magnitude", "CAP"):
        for way in WAYS:
            found = {r: run(tasks, way, pruners(tasks[0])[name], r, args) for r in args.ratios}
            lost = {r: statistics.mean(f.lost) for r, f in found.items()}
            rows.append((name, way, *map(str, found.values()), reached(lost)))
    print(heading(tasks, args, begun), "\n")
    print_table(("method", "way", *(f"{r:g}" for r in args.ratios), "at one point lost"), rows)


def main() -> None:
    parts: dict[str, Callable[[Sequence[Task], argparse.Namespace], None]]
    parts = {"methods": methods, "ratio": ratio}
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
        tasks = [build(name, seed, args) for seed in range(args.seeds)]
        for part in args.parts:
            parts[part](tasks, args)


if __name__ == "__main__":
    main()
