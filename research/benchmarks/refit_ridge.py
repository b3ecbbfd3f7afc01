"""What the ridge toward the dense weights brings where inputs are few, and costs where they abound.

A layer is pruned on some inputs, and its error is measured on others of the same distribution: the
squared change of the outputs as a share of the outputs. Inputs are Gaussian with the spectrum
``1 / k`` in a random basis, times column scales as transformers have them. Medians over seeds.

    python -m research.benchmarks.refit_ridge [--columns 256] [--rows 128] [--seeds 5]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from prunus.core.patterns import parse_pattern
from prunus.solvers import admm
from prunus.solvers.least_squares import refit, ridge_of, with_ridge
from prunus.solvers.mask_swaps import swap

from research.benchmarks.measure import hardware

SHARES = (0.25, 0.5, 1, 2, 4, 8, 32)
"""of inputs to columns"""
SWAPS = 10  # passes over the groups
Solve = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def refitted(w: Tensor, gram: Tensor, mask: Tensor, ridge: float) -> Tensor:
    return refit(w, torch.where(mask, w, 0), gram, mask, ridge=ridge)


def swapped(w: Tensor, gram: Tensor, mask: Tensor, ridge: float) -> Tensor:
    return torch.where(swap(w, with_ridge(gram, ridge), mask, SWAPS, 4), w, 0)


def both(w: Tensor, gram: Tensor, mask: Tensor, ridge: float) -> Tensor:
    return refitted(w, gram, swap(w, with_ridge(gram, ridge), mask, SWAPS, 4), ridge)


def alps(w: Tensor, gram: Tensor, mask: Tensor, ridge: float) -> Tensor:
    project = partial(parse_pattern("2:4").mask, drop=0)
    return admm.solve(w, gram, project, 300, 0.01, ridge)[0]


METHODS: dict[str, Solve] = {"swap": swapped, "refit": refitted, "swap + refit": both, "alps": alps}


class Inputs:
    """Of one distribution, as many as are asked for."""

    def __init__(self, columns: int, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(self._randn(columns, columns))[0]
        spectrum = torch.arange(1, columns + 1).float().rsqrt()
        self.mix = spectrum[:, None] * basis * torch.exp(0.7 * self._randn(columns))

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def __call__(self, count: int) -> Tensor:
        return self._randn(count, len(self.mix)) @ self.mix


def errors(args: argparse.Namespace, seed: int) -> dict[tuple[str, float, bool], float]:
    """By method, share of inputs, and whether there is a ridge."""
    inputs = Inputs(args.columns, seed)
    w = torch.randn(args.rows, args.columns, generator=inputs.generator) * 0.05
    fresh = inputs(64 * args.columns)
    test, found = fresh.T @ fresh, {}
    whole = float(((w @ test) * w).sum())
    for share in SHARES:
        x = inputs(round(share * args.columns))
        gram = x.T @ x
        mask = parse_pattern("2:4").mask(w.abs() * x.norm(dim=0), 0)
        for name, solve in METHODS.items():
            for ridge in (0.0, ridge_of(len(x), args.columns)):
                gap = solve(w, gram, mask, ridge) - w
                found[name, share, ridge > 0] = float(((gap @ test) * gap).sum()) / whole
        gap = torch.where(mask, 0, w)
        found["the mask alone", share, True] = float(((gap @ test) * gap).sum()) / whole
        found["the mask alone", share, False] = found["the mask alone", share, True]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--columns", type=int, default=256)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    args.device, args.threads, args.clock = "cpu", 1, "wall"
    print(hardware(args))
    runs = [errors(args, seed) for seed in range(args.seeds)]
    print(f"2:4, {args.rows} x {args.columns}; error on new inputs, %, without -> with the ridge\n")
    print("| inputs / columns | " + " | ".join(map(str, SHARES)) + " |")
    print("|---" * (len(SHARES) + 1) + "|")
    for name in ("the mask alone", *METHODS):
        cells = []
        for share in SHARES:
            plain, ridged = (
                100 * statistics.median(run[name, share, ridge] for run in runs)
                for ridge in (False, True)
            )
            same = name not in METHODS
            cells.append(f"{plain:.2f}" if same else f"{plain:.2f} -> {ridged:.2f}")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
