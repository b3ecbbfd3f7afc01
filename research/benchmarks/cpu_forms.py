"""What `prunus.accelerate` brings on a CPU: pruned models before and after, in turn.

- an MLP of 1024-4096-1024-4096-1024
- the demo's vision transformer (64 channels, 4 blocks, 16 tokens), and one of 384 channels with
  6 blocks and 64 tokens

each pruned by magnitude, every layer alike, at 80, 90 and 95 %, with batches of 1, 16 and 128
(the wider transformer up to 16). Median milliseconds of a forward pass, the median of the ratios
of each round with their middle half, and which forms the layers took.

    python -m research.benchmarks.cpu_forms [--rounds 11] [--threads 1 --clock cpu]
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from itertools import pairwise

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

import prunus

from research import demo
from research.benchmarks.measure import add_options, hardware, print_table, seconds, spread

SPARSITIES, BATCHES = (0.8, 0.9, 0.95), (1, 16, 128)


def mlp() -> nn.Module:
    sizes = (1024, 4096, 1024, 4096, 1024)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def wider() -> nn.Module:
    return VisionTransformer(
        img_size=32, patch_size=4, num_classes=10, embed_dim=384, depth=6, num_heads=6
    )


Case = tuple[str, Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]
CASES: list[Case] = [
    ("MLP", mlp, (1024,), BATCHES),
    ("demo's transformer", demo.build, (1, 8, 8), BATCHES),
    ("wider transformer", wider, (3, 32, 32), BATCHES[:2]),
]


@torch.no_grad()
def row(
    name: str, dense: nn.Module, sparsity: float, x: Tensor, rounds: int, args: argparse.Namespace
) -> list[str]:
    sparse = copy.deepcopy(dense)
    result = prunus.accelerate(sparse, x)
    sides = (dense, sparse)
    for model in sides:
        model(x)
    times = [
        [seconds(lambda model=model: model(x), args) for model in sides] for _ in range(rounds)
    ]
    before, after = (1e3 * statistics.median(side) for side in zip(*times, strict=True))
    ratios = [slow / fast for slow, fast in times]
    forms = ", ".join(f"{count} {form}" for form, count in result.forms.most_common())
    return [
        *(name, f"{100 * sparsity:.0f} %", str(len(x)), f"{before:.2f}", f"{after:.2f}"),
        *(f"{statistics.median(ratios):.2f}", spread(ratios), forms),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_options(parser)
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    print(hardware(args), "\n")
    rows = []
    for name, build, shape, batches in CASES:
        for sparsity in SPARSITIES:
            torch.manual_seed(0)
            model = build().eval()
            prunus.prune(model, "magnitude", sparsity=sparsity, allocator="uniform")
            rows += [
                row(name, model, sparsity, torch.randn(batch, *shape), args.rounds, args)
                for batch in batches
            ]
    header = ("model", "sparsity", "batch", "ms dense", "ms now", "ratio", "middle half", "layers")
    print_table(header, rows)


if __name__ == "__main__":
    main()
