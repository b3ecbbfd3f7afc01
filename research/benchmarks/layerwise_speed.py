"""The column sweep of SparseGPT beside its loop as published, written plainly.

Both get the same factor of the same Gram matrix, so only the sweep itself is timed; the loop is
row-major, over single columns, with a full sort for each 128 columns and a `topk` for each group of
N:M. The layers' outputs differ by rounding only, which is checked.

    python -m research.benchmarks.layerwise_speed [--threads 2] [--device cuda]
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from prunus.core.patterns import NM, Pattern, parse_pattern
from prunus.solvers.column_sweep import PANEL, STRIPE, Choose, sweep_columns, upper_factor
from prunus.solvers.column_sweep_numpy import Groups
from prunus.solvers.least_squares import relative_error
from prunus.solvers.selection import keep_all_but_lowest

from research.benchmarks.measure import Row, add_options, compare, hardware, print_table

SHAPES = ((3072, 768), (768, 3072))
PATTERNS = ("unstructured", "2:4")


def published_sweep(w: Tensor, u: Tensor, pattern: Pattern) -> Tensor:
    w = w.clone()
    for begin in range(0, w.shape[1], STRIPE):
        end = min(begin + STRIPE, w.shape[1])
        part, factor = w[:, begin:end].clone(), u[begin:end, begin:end]
        new, errors, losses = (torch.zeros_like(part) for _ in range(3))
        drop = torch.zeros_like(part, dtype=torch.bool)
        if not isinstance(pattern, NM):
            scores = part.square() / factor.diagonal().square()
            drop = scores <= scores.flatten().sort()[0][scores.numel() // 2 - 1]
        for i in range(end - begin):
            if isinstance(pattern, NM) and i % pattern.m == 0:
                at = slice(i, i + pattern.m)
                scores = part[:, at].square() / factor.diagonal()[at].square()
                lowest = torch.topk(scores, pattern.m - pattern.n, dim=1, largest=False).indices
                drop.scatter_(1, i + lowest, True)
            column = part[:, i]
            kept = column.masked_fill(drop[:, i], 0)
            error = (column - kept) / factor[i, i]
            new[:, i] = kept
            losses[:, i] = (column - kept) ** 2 / factor[i, i] ** 2
            part[:, i:] -= error.unsqueeze(1).matmul(factor[i, i:].unsqueeze(0))
            errors[:, i] = error
        w[:, begin:end] = new
        w[:, end:] -= errors @ u[begin:end, end:]
    return w


def chooser(w: Tensor, pattern: Pattern) -> tuple[Choose, int]:
    """How the sweep chooses masks of a layer without zeros, and every how many columns."""
    if isinstance(pattern, NM):
        alive, useless = torch.ones_like(w, dtype=torch.bool), torch.zeros_like(w[0]).bool()
        return Groups(pattern.n, pattern.m, alive, useless), pattern.m
    return lambda scores, *_: keep_all_but_lowest(scores, scores.numel() // 2), STRIPE


def layer(rows: int, cols: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, Gram matrix and factor, of inputs that are correlated and of uneven scale."""
    torch.manual_seed(0)
    mix = torch.randn(cols, cols, dtype=torch.float64) * torch.arange(1, cols + 1) ** -0.5
    x = torch.randn(2 * cols, cols, dtype=torch.float64) @ mix.T
    gram = x.T @ x
    h = gram * (2 / len(x))
    h.diagonal().add_(0.01 * h.diagonal().mean())
    u = upper_factor(h).float().to(device)
    return torch.randn(rows, cols, device=device), gram.float().to(device), u


def bench(rows: int, cols: int, name: str, args: argparse.Namespace) -> Row:
    w, gram, u = layer(rows, cols, args.device)
    pattern = parse_pattern(name)
    choose, every = chooser(w, pattern)
    new, published = sweep_columns(w, u, choose, every)[0], published_sweep(w, u, pattern)
    errors = relative_error(w, new, gram), relative_error(w, published, gram)
    assert abs(errors[0] / errors[1] - 1) < 1e-2, errors
    return compare(
        f"{rows}x{cols}, {name}",
        lambda: sweep_columns(w, u, choose, every),
        lambda: published_sweep(w, u, pattern),
        args,
        "4" if args.device == "cpu" else "",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_options(parser)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    print(hardware(args), "\n")
    rows = [bench(*shape, name, args) for shape in SHAPES for name in PATTERNS]
    print_table(("layer", "prunus, s", "published loop, s", "ratio", "goal"), rows)
    steps = [("published loop", "768", "768")]
    steps.append(("triangular solves", str(-(-768 // PANEL)), str(768 // 4)))
    print_table(("steps one after the other, 768 columns", "unstructured", "2:4"), steps)


if __name__ == "__main__":
    main()
