"""Channels out of a ResNet-20 on CIFAR-10 without training: criteria, compensation, Torch-Pruning.

All sides prune the same network to the same share of multiply-accumulates, uniformly over its
layers, and have their BatchNorm estimated anew on the same calibration images; the accuracy is
that of the validation images. Torch-Pruning's row is its group magnitude with the same numbers of
channels (``pip install torch-pruning``; without it the row is left out).

    python -m research.benchmarks.channels_resnet20 --weights WEIGHTS --data cifar10.tar.gz
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import prunus
from prunus.calibration.batch_norm import recalibrate
from prunus.channels import channels, shrink

from research.benchmarks.measure import add_options, hardware, print_table
from research.benchmarks.resnet20_cifar10 import ResNet20, read_images, top1

CRITERIA = ("random", "magnitude", "gamma", "taylor", "activation", "flap", "obs")
UPDATES = ("none", "bias", "weights")


def torch_pruning(model: nn.Module, keep: float, x: Tensor) -> bool:
    """The group magnitude of Torch-Pruning, at one ratio for all layers; False if not installed."""
    try:
        import torch_pruning as tp
    except ImportError:
        return False
    pruner = tp.pruner.BasePruner(
        model,
        x,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=1 - keep,
        ignored_layers=[model.linear],
    )
    pruner.step()
    return True


def macs(model: nn.Module, x: Tensor) -> int:
    return channels(model, x).costs.total("macs")


def matched(model: nn.Module, target: float, x: Tensor) -> tuple[nn.Module, float] | None:
    """Torch-Pruning's model at the largest ratio that costs no more than ours may."""
    dense = macs(model, x)
    low, high, best = 0.05, 1.0, None
    for _ in range(9):
        middle = (low + high) / 2
        pruned = copy.deepcopy(model)
        if not torch_pruning(pruned, middle, x):
            return None
        share = macs(pruned, x) / dense
        if share <= target:
            low, best = middle, (pruned, share)
        else:
            high = middle
    return best


def calibration_of(images: Tensor, labels: Tensor, seed: int, count: int) -> prunus.Calibration:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]
    batches = list(zip(images[order].split(128), labels[order].split(128), strict=True))
    return prunus.Calibration(batches, F.cross_entropy)


def rows_of(
    model: nn.Module,
    target: float,
    seeds: list[prunus.Calibration],
    accuracy: Callable[[nn.Module], float],
    args: argparse.Namespace,
) -> list[tuple[str, ...]]:
    x = torch.randn(1, 3, 32, 32)
    rows = []
    pair = matched(model, target, x)
    if pair is not None:
        scores = []
        for data in seeds:
            pruned = copy.deepcopy(pair[0])
            recalibrate(pruned, data)
            scores.append(accuracy(pruned))
        rows.append(row("torch-pruning, magnitude", "none", pair[1], scores))
    for name in args.criteria:
        for update in args.updates:
            if update == "none" and name in ("obs", "flap"):
                continue  # they bring an update of their own
            scores, share = [], 0.0
            for data in seeds:
                pruned = copy.deepcopy(model)
                result = shrink(
                    pruned,
                    x,
                    name,
                    {"macs": target},
                    calibration=data,
                    compensate=False if update == "none" else update,
                    measure=False,
                    exclude=args.exclude,
                    allocator=args.allocator,
                )
                share = result.after.macs / result.before.macs
                scores.append(accuracy(pruned))
            rows.append(row(name, update, share, scores))
            print(*rows[-1], flush=True)
    return rows


def row(name: str, update: str, share: float, scores: list[float]) -> tuple[str, ...]:
    mean, spread = statistics.mean(scores), max(scores) - min(scores)
    return name, update, f"{share:.3f}", f"{100 * mean:.2f}", f"{100 * spread:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add_options(parser)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="tar of train and val folders")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.5, 0.35])
    parser.add_argument(
        "--images", type=int, default=1024, help="of the training split, to calibrate"
    )
    parser.add_argument("--val", type=int, default=10000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--criteria", nargs="+", default=list(CRITERIA))
    parser.add_argument("--updates", nargs="+", default=list(UPDATES))
    parser.add_argument("--exclude", nargs="*", default=[])
    parser.add_argument("--allocator", default="uniform")
    args: Any = parser.parse_args()
    print(hardware(args))
    model = ResNet20()
    model.load_state_dict(load_file(args.weights))
    model.eval()
    val, val_labels = read_images(args.data, "val")
    order = torch.randperm(len(val), generator=torch.Generator().manual_seed(0))[: args.val]
    val, val_labels = val[order], val_labels[order]
    images, labels = read_images(args.data, "train")
    seeds = [calibration_of(images, labels, s, args.images) for s in range(args.seeds)]
    print(f"dense: {100 * top1(model, val, val_labels):.2f} on {len(val)} images\n")
    for target in args.targets:
        rows = rows_of(model, target, seeds, lambda m: top1(m, val, val_labels), args)
        print(
            f"\n{target:g} of the multiply-accumulates, {args.images} images, {args.seeds} seeds\n"
        )
        print_table(("criterion", "compensation", "share left", "top-1", "spread"), rows)


if __name__ == "__main__":
    main()
