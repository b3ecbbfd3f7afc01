"""What the second-order methods cost, each beside the program as published, in one process.

- ``C``: the inverse of the blockwise Fisher of a 768x3072 layer from gradients that lie ready,
  against the rank-1 recursion for each gradient in float32 (oBERT, https://arxiv.org/abs/2203.07259,
  eq. 7). Its steps all cost the same, so a few are timed and multiplied.
- CAP's losses and new weights from C and F, against the elimination that updates all of C at every
  step for all rows at once and keeps the weights after each (https://arxiv.org/abs/2210.09223,
  algorithm 1); likewise a few of its steps.
- FastCAP's sweep against the loop over columns with a sort for each stripe
  (https://arxiv.org/abs/2301.00774, algorithm 1).
- gradients of single examples from one backward pass, against one pass for each example.
- a sweep over five sparsities against five runs.

    python -m research.benchmarks.second_order_speed [--rounds 3] [--device cuda] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

import prunus
from prunus.calibration.example_gradients import (
    ExampleGradients,
    gradients_on,
    micro_batch_gradients,
)
from prunus.core.patterns import Unstructured
from prunus.core.ranks import Ranks
from prunus.core.selection import select
from prunus.pruners import CAP
from prunus.solvers.column_sweep import sweep_columns, upper_factor
from prunus.solvers.obs import greedy_losses
from prunus.solvers.selection import keep_all_but_lowest
from prunus.stats import BlockFisher, Sampling

from research.benchmarks.layerwise_speed import published_sweep
from research.benchmarks.measure import Row, add_options, compare, hardware, print_table, seconds

ROWS, COLS, BLOCK, GRADS, DAMP = 768, 3072, 192, 1024, 1e-6


def gradient(rows: int, seed: int) -> Tensor:
    """Columns of very different scale and correlated with each other, as gradients are."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(rows, 1, generator=generator)
    scale = torch.logspace(-3, -2, COLS)
    return (torch.randn(rows, COLS, generator=generator) + common) * scale


def filled(rows: int, grads: list[Tensor], device: str, dtype: torch.dtype) -> BlockFisher:
    stat = BlockFisher(
        rows, COLS, sampling=Sampling(GRADS), block_size=BLOCK, damp=DAMP, dtype=dtype
    )
    for i in range(GRADS):
        stat.update(grads[i % len(grads)].to(device).unsqueeze(0))
    return stat


def rank_one_step(inv: Tensor, g: Tensor) -> None:
    product = torch.einsum("bij,bj->bi", inv, g)
    alpha = (GRADS + torch.einsum("bi,bi->b", g, product)).sqrt().unsqueeze(1)
    product /= alpha
    inv.baddbmm_(product.unsqueeze(2), product.unsqueeze(1), alpha=-1)


def published_inverse(rows: int, device: str) -> Tensor:
    blocks = rows * COLS // BLOCK
    eye = torch.eye(BLOCK, device=device).expand(blocks, BLOCK, BLOCK)
    return (eye / DAMP).contiguous()


def bench_inverse(args: argparse.Namespace) -> list[Row]:
    grads = [gradient(ROWS, seed) for seed in range(4)]
    w = torch.zeros(ROWS, COLS, device=args.device)

    def mine() -> None:
        stat = filled(ROWS, grads, args.device, torch.float32)
        stat.per_block(lambda blocks, _: blocks.inverse()[:, 0], w)

    inv = published_inverse(ROWS, args.device)
    blocks = [g.to(args.device).view(-1, BLOCK) for g in grads]

    def theirs() -> None:
        for g in blocks:
            rank_one_step(inv, g)

    row = compare("C, m=1024", mine, theirs, args, "10", GRADS / len(grads))
    return [row, accuracy_of_inverse(args)]


def accuracy_of_inverse(args: argparse.Namespace) -> Row:
    """Largest error of an entry over the largest entry, against float64, on four rows."""
    rows = 4
    grads = [gradient(rows, seed).to(args.device) for seed in range(GRADS)]
    exact = filled(rows, grads, args.device, torch.float64).inverse_block(0)
    fast = filled(rows, grads, args.device, torch.float32).inverse_block(0)
    inv = published_inverse(rows, args.device)
    for g in grads:
        rank_one_step(inv, g.view(-1, BLOCK))
    errors = [
        float((t.cpu().double() - exact.cpu()).abs().max() / exact.abs().max())
        for t in (fast, inv[0])
    ]
    ratio = errors[1] / errors[0]
    return "error of C", f"{errors[0]:.1e}", f"{errors[1]:.1e}", f"{ratio:.1f}", "1"


def traced_elimination(inv: Tensor, w: Tensor, trace: Tensor, step: int, alive: Tensor) -> None:
    """One step of the published elimination: every block, all of C, the weights into the trace."""
    at = torch.arange(len(w), device=w.device)
    diag = inv.diagonal(dim1=1, dim2=2)
    price = torch.where(alive, w.square() / diag, torch.inf)
    p = price.argmin(1)
    column = inv[at, :, p]
    pivot = diag[at, p].unsqueeze(1)
    w -= column * (w[at, p].unsqueeze(1) / pivot)
    scaled = column / pivot.sqrt()
    inv -= torch.bmm(scaled.unsqueeze(2), scaled.unsqueeze(1))
    alive[at, p] = False
    w *= alive
    inv[at, p, p] = 1
    trace[step] = w


def bench_cap(args: argparse.Namespace) -> list[Row]:
    grads = [gradient(ROWS, seed) for seed in range(256)]
    stat = filled(ROWS, grads, args.device, torch.float32)
    del grads
    w = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(0)).to(args.device)
    pruner, pattern = CAP(block_size=BLOCK), prunus.core.patterns.Unstructured()

    def whole() -> None:
        scores = pruner.scores(w, stat, pattern, Ranks())
        pruner.rebuild(w, stat, keep_all_but_lowest(scores, w.numel() * 3 // 4))

    def mine() -> None:  # the inverse lies ready
        parts = zip(inv.split(256), blocks.split(256), strict=True)
        losses = torch.cat([greedy_losses(c.double(), part.double()) for c, part in parts])
        mask = keep_all_but_lowest(losses, w.numel() * 3 // 4).view_as(w)
        pruner.rebuild(w, stat, mask)

    steps, blocks = 4, w.view(-1, BLOCK)
    inv = published_inverse(ROWS, args.device)
    trace = torch.empty(steps, *blocks.shape, device=args.device)

    def theirs() -> None:
        state, alive = blocks.clone(), torch.ones_like(blocks, dtype=torch.bool)
        for step in range(steps):
            traced_elimination(inv, state, trace, step, alive)

    row = compare("CAP losses and weights from C", mine, theirs, args, "5", BLOCK / steps)
    seconds_whole = f"{seconds(whole, args):.2f}"
    return [row, ("the same with C from F", seconds_whole, "", "", "")]


def bench_memory(args: argparse.Namespace) -> list[Row]:
    """Peak memory of CAP beyond the Fisher, as it grows with the layer: fresh processes."""
    peaks = []
    for rows in (ROWS, 2 * ROWS):
        command = [
            sys.executable,
            "-m",
            "research.benchmarks.second_order_speed",
            "--peak",
            str(rows),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(float(done.stdout.split()[-1]))
    grown = (peaks[1] - peaks[0]) / (ROWS * COLS)
    fixed = (peaks[0] - grown * ROWS * COLS) / 2**20
    name = f"CAP, bytes a weight beyond F (and {fixed:.0f} MiB whatever the layer)"
    published = 4 * (BLOCK + 1)  # its trace alone
    return [(name, f"{grown:.1f}", f"{published}", f"{published / grown:.0f}", "48 (16 bytes)")]


def peak_beyond_fisher(rows: int) -> int:
    """Bytes by which CAP's scores and rebuilding raise the resident size of a process (Linux)."""
    stat = BlockFisher(rows, COLS, sampling=Sampling(GRADS), block_size=BLOCK, damp=DAMP)
    w = torch.randn(rows, COLS)
    for seed in range(48):
        stat.update(gradient(rows, seed).unsqueeze(0))
    pruner = CAP(block_size=BLOCK)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident("VmRSS")
    scores = pruner.scores(w, stat, prunus.core.patterns.Unstructured(), Ranks())
    pruner.rebuild(w, stat, keep_all_but_lowest(scores, w.numel() * 3 // 4))
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """Bytes that the system counts for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def bench_fastcap(args: argparse.Namespace) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    g = torch.cat([gradient(ROWS, seed) for seed in range(8)]).double()
    f = 2 * g.T @ g / 8
    f.diagonal().add_(0.01 * f.diagonal().mean())
    u = upper_factor(f.to(args.device))
    rows = []
    for shape in ((ROWS, COLS), (COLS, ROWS)):
        w = torch.randn(*shape, generator=generator).to(args.device)
        factor = u[: shape[1], : shape[1]].contiguous()

        def choose(scores: Tensor, begin: int, end: int) -> Tensor:
            return keep_all_but_lowest(scores, scores.numel() // 2)

        def mine(w: Tensor = w, factor: Tensor = factor) -> None:
            sweep_columns(w, factor.float(), choose)

        def theirs(w: Tensor = w, factor: Tensor = factor) -> None:
            published_sweep(w, factor.float(), Unstructured())

        rows.append(compare(f"FastCAP sweep, {shape[0]}x{shape[1]}", mine, theirs, args, "4"))
    return rows


def small_vit(dim: int = 128, side: int = 32, patch: int = 4, depth: int = 6) -> nn.Module:
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=side, patch_size=patch, num_classes=10, embed_dim=dim, depth=depth, num_heads=4
    ).eval()


def bench_examples(args: argparse.Namespace) -> list[Row]:
    """Two sizes: the smaller the model, the more of a pass is overhead that a batch shares."""
    return [examples_of(small_vit(dim, 8, 2, 4), args) for dim in (32, 64)]


def examples_of(model: nn.Module, args: argparse.Namespace) -> Row:
    model = model.to(args.device)
    layers = select(model, None, ()).layers
    size = sum(layer.weight.numel() for layer in layers)
    batch = (torch.randn(64, 3, 8, 8), torch.randint(10, (64,)))
    data = prunus.Calibration([batch], nn.functional.cross_entropy)
    singles = [(batch[0][i : i + 1], batch[1][i : i + 1]) for i in range(64)]
    take = ExampleGradients(model, layers, data, 16)
    with gradients_on(model, layers):
        list(take(batch))  # its check of the first batch

        def mine() -> None:
            for _ in take(batch):
                pass

        def theirs() -> None:
            for one in singles:
                micro_batch_gradients(model, layers, data, one)

        return compare(
            f"64 gradients of examples, ViT of {size:,} weights", mine, theirs, args, "10"
        )


def bench_sweep(args: argparse.Namespace) -> list[Row]:
    model = small_vit().to(args.device)
    batches = [(torch.randn(8, 3, 32, 32), torch.randint(10, (8,))) for _ in range(256)]
    data = prunus.Calibration(batches, nn.functional.cross_entropy)
    sparsities = [0.5, 0.6, 0.7, 0.8, 0.9]
    saved = {name: t.clone() for name, t in model.state_dict().items()}

    def mine() -> None:
        prunus.sweep(model, CAP(num_grads=256), sparsities, lambda m: 0.0, calibration=data)

    def theirs() -> None:
        for sparsity in sparsities:
            prunus.prune(model, CAP(num_grads=256), sparsity=sparsity, calibration=data)
            model.load_state_dict(saved)

    return [compare("CAP at five sparsities", mine, theirs, args, "4")]


BENCHES = {
    "inverse": bench_inverse,
    "cap": bench_cap,
    "memory": bench_memory,
    "fastcap": bench_fastcap,
    "examples": bench_examples,
    "sweep": bench_sweep,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_options(parser)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=list(BENCHES))
    parser.add_argument("--peak", type=int, help="(for the benchmark of memory itself)")
    args = parser.parse_args()
    if args.peak:
        print(peak_beyond_fisher(args.peak))
        return
    print(hardware(args), "\n")
    rows = []
    for name in args.only:
        for row in BENCHES[name](args):
            rows.append(row)
            print("  ".join(row), file=sys.stderr, flush=True)
    print_table(("what", "prunus, s", "other, s", "ratio", "goal"), rows)


if __name__ == "__main__":
    main()
