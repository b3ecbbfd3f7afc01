"""What 2:4 training costs and gains.

On any machine: what the two rules keep of Gaussian weights, and the time to choose masks beside the
dense forward and backward of the same layer. With ``--device cuda``, too: forward and backward of
an MLP (by default of ViT-L on 44,160 tokens, in fp16) with dense weights, 2:4 weights and 2:4
activations, which take turns in one process, and apart from it the products and what it takes to
make an operand sparse while training runs (choosing the mask, packing), for several shapes.

    python -m research.benchmarks.semi_sparse_training [--device cuda] [--tokens 44160]
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable

import torch
from torch import nn

from prunus.execution.training import (
    SemiSparse,
    kernels,
    swap_linear_with_semi_sparse_linear,
    tile_mask,
)
from prunus.execution.training.straight import masked

from research.benchmarks.measure import add_options, hardware, print_table, seconds

RULES = ("exact", "greedy")
KINDS = ("weight", "activation")


def keeps(rule: str, size: int = 4096) -> tuple[float, float]:
    """Shares of the weights and of their energy; ``signed`` is the kernel's own default."""
    w = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    mask = tile_mask(w - w.min(), "greedy") if rule == "signed" else tile_mask(w, rule)
    kept = torch.where(mask, w, 0)
    return mask.float().mean().item(), (kept.square().sum() / w.square().sum()).item()


def medians(runs: dict[str, Callable[[], object]], args: argparse.Namespace) -> dict[str, float]:
    """Seconds of each, the runs taking turns; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(args.rounds + 1):
        for name, run in runs.items():
            taken = seconds(run, args)
            if i:
                times[name].append(taken)
    return {name: statistics.median(values) for name, values in times.items()}


def training(model: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """Forward and backward, the gradient of the input included, and new masks each time."""
    gradient = torch.randn_like(model(x))

    def step() -> None:
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.0)  # a new version, as after an optimizer's step
        model.zero_grad()
        model(x).backward(gradient)

    return step


def choosing(args: argparse.Namespace) -> None:
    rows = []
    for size in args.sizes:
        w = torch.randn(size, size, device=args.device)
        x = torch.randn(args.batch, size, device=args.device, requires_grad=True)
        linear = nn.Linear(size, size, device=args.device)
        runs: dict[str, Callable[[], object]] = {
            rule: lambda w=w, rule=rule: tile_mask(w, rule) for rule in RULES
        }
        runs["dense"] = training(linear, x)
        taken = medians(runs, args)
        shares = [f"{100 * taken[rule] / taken['dense']:.1f} %" for rule in RULES]
        milliseconds = [f"{1000 * taken[name]:.1f}" for name in (*RULES, "dense")]
        rows.append([f"{size} x {size}", *milliseconds, *shares])
    header = ["weight", *(f"{rule}, ms" for rule in RULES), "dense step, ms"]
    print_table([*header, *(f"{rule}'s share" for rule in RULES)], rows)


def mlps(args: argparse.Namespace, width: int, hidden: int) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    half = {"device": args.device, "dtype": torch.float16}
    dense = nn.Sequential(
        nn.Linear(width, hidden, **half), nn.GELU(), nn.Linear(hidden, width, **half)
    )
    models: dict[str, nn.Module] = {"dense": dense}
    for kind in KINDS:
        for rule in RULES:
            twin = copy.deepcopy(dense)
            options = SemiSparse(kind=kind, rule=rule)
            # as published: of the activations those within the MLP
            swap_linear_with_semi_sparse_linear(twin, {"*" if kind == "weight" else "2": options})
            models[f"{kind}, {rule}"] = twin
    return models


def blocks(args: argparse.Namespace) -> None:
    """Forward and backward of MLPs, and by how much each is faster than the dense one."""
    rows, names = [], []
    for tokens, width, hidden in [(args.tokens, 1024, 4096), *grid(args)]:
        x = torch.randn(tokens, width, device=args.device, dtype=torch.float16, requires_grad=True)
        models = mlps(args, width, hidden)
        taken = medians({name: training(model, x) for name, model in models.items()}, args)
        names = list(taken)
        ratios = [f"{1000 * t:.2f} ({taken['dense'] / t:.2f}x)" for t in taken.values()]
        rows.append([f"{tokens} x {width} -> {hidden} -> {width}", *ratios])
        del models
    print_table(["MLP", *(f"{name}, ms" for name in names)], rows)


def grid(args: argparse.Namespace) -> list[tuple[int, int, int]]:
    return [(tokens, n, n) for tokens in args.batches for n in (1024, 2048, 4096, 8192, 16384)]


def parts(args: argparse.Namespace) -> None:
    """One product dense and sparse, and what it takes to make its operand sparse."""
    rows = []
    for tokens, _, n in grid(args):
        w = torch.randn(n, n, device=args.device, dtype=torch.float16)
        x = torch.randn(tokens, n, device=args.device, dtype=torch.float16)
        mask = tile_mask(w)
        hidden = masked(w, mask, "masked", 0.0)
        packed = kernels.pack(hidden)
        runs: dict[str, Callable[[], object]] = {
            "dense product": lambda x=x, w=w: torch.mm(x, w.t()),
            "sparse product": lambda x=x, packed=packed: torch.mm(x, packed.t()),
            "transposed": lambda x=x, packed=packed: torch.mm(x, packed),
            "exact mask": lambda w=w: tile_mask(w, "exact"),
            "greedy mask": lambda w=w: tile_mask(w, "greedy"),
            "masking": lambda w=w, mask=mask: masked(w, mask, "masked", 0.0),
            "packing": lambda hidden=hidden: kernels.pack(hidden),
        }
        taken = medians(runs, args)
        rows.append([f"{tokens} x {n} x {n}", *(f"{1000 * t:.3f}" for t in taken.values())])
    header = ["ms", "dense product", "sparse product", "transposed", "exact mask", "greedy mask"]
    print_table([*header, "masking", "packing"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_options(parser)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--batch", type=int, default=4096, help="tokens of the dense step")
    parser.add_argument("--tokens", type=int, default=44160, help="of the ViT-L MLP, on CUDA")
    parser.add_argument("--batches", type=int, nargs="+", default=[4096, 16384], help="on CUDA")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(hardware(args), "\n")

    rows = [(r, *(f"{100 * share:.1f} %" for share in keeps(r))) for r in (*RULES, "signed")]
    print_table(("rule", "weights kept", "energy kept"), rows)
    print(f"Choosing masks in fp32, beside a dense step on {args.batch} tokens\n")
    choosing(args)
    if args.device == "cuda":
        print("Forward and backward of an MLP in fp16, masks chosen anew in each\n")
        blocks(args)
        print("The parts of one layer, fp16\n")
        parts(args)


if __name__ == "__main__":
    main()
