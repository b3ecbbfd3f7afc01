"""Time and memory of one-shot magnitude pruning of a large model.

`prunus.prune` prunes 100 million weights to 75 % by one global ranking. Beside it, in turn: one
`torch.kthvalue` over the same scores (already concatenated, and it only finds the threshold) and
`torch.nn.utils.prune.global_unstructured`; then `prunus.prune` with other patterns.

Peak memory is measured in a fresh process for each, so that no earlier peak hides it, as what is
used beyond the resident model, in units of the pruned weights' bytes.

    python -m research.benchmarks.global_magnitude [--device cuda]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

import prunus

from research.benchmarks.measure import PeakMemory, add_options, hardware, print_table, seconds

SPARSITY = 0.75
PATTERNS = ("row", "2:4", "4x1", "1x4")
KTHVALUE, TORCH_PRUNE = "torch.kthvalue alone", "torch.nn.utils.prune"


def build(args: argparse.Namespace) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(args.width, args.width, bias=False) for _ in range(args.layers)]
    return nn.Sequential(*layers).to(args.device)


def weights_of(model: nn.Sequential) -> list[Tensor]:
    return [layer.weight.detach() for layer in model]


def prune_with_prunus(model: nn.Module, pattern: str) -> None:
    sparsity = SPARSITY if pattern != "2:4" else None  # 2:4 is a sparsity of its own
    prunus.prune(model, "magnitude", sparsity=sparsity, pattern=pattern, layers=["Linear"])


def prune_with_torch(model: nn.Sequential) -> None:
    chosen = [(layer, "weight") for layer in model]
    torch_prune.global_unstructured(chosen, torch_prune.L1Unstructured, amount=SPARSITY)
    for layer, name in chosen:
        torch_prune.remove(layer, name)


def kthvalue(scores: Tensor) -> None:
    float(scores.kthvalue(round(SPARSITY * scores.numel())).values)


# --- time ----------------------------------------------------------------------------------------


def measure_time(args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of each side; the weights are put back before each call, unmeasured."""
    model = build(args)
    dense = [w.clone() for w in weights_of(model)]
    scores = torch.cat([w.abs().flatten() for w in dense])
    sides: dict[str, Callable[[], None]] = {KTHVALUE: lambda: kthvalue(scores)}
    for pattern in ("unstructured", *PATTERNS):
        sides[pattern] = lambda pattern=pattern: prune_with_prunus(model, pattern)
    sides[TORCH_PRUNE] = lambda: prune_with_torch(model)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, side in sides.items():
            for layer, w in zip(model, dense, strict=True):
                layer.weight.detach().copy_(w)
            times[name].append(seconds(side, args))
    return {name: statistics.median(values) for name, values in times.items()}


# --- memory --------------------------------------------------------------------------------------


def measure_memory(args: argparse.Namespace) -> float:
    """Peak extra memory of one side over the bytes of the pruned weights, in this process."""
    small = argparse.Namespace(**{**vars(args), "width": 64, "layers": 2})
    model = build(args)
    size = sum(w.numel() * w.element_size() for w in weights_of(model))

    def run(model: nn.Sequential) -> None:
        if args.memory_of == TORCH_PRUNE:
            prune_with_torch(model)
        elif args.memory_of == KTHVALUE:
            kthvalue(torch.cat([w.abs().flatten() for w in weights_of(model)]))
        else:
            prune_with_prunus(model, args.memory_of)

    run(build(small))  # imports, threads and kernels are not the subject
    with PeakMemory(args.device) as memory:
        run(model)
    return memory.extra / size


def measure_memory_in_fresh_process(args: argparse.Namespace, name: str) -> float:
    options = ["--device", args.device, "--width", str(args.width), "--layers", str(args.layers)]
    options += ["--threads", str(torch.get_num_threads())]
    command = [
        sys.executable,
        "-m",
        "research.benchmarks.global_magnitude",
        *options,
        "--memory-of",
        name,
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_options(parser)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-of", help="print the peak memory of one side and stop")
    args = parser.parse_args()
    machine = hardware(args)
    if args.memory_of:
        print(measure_memory(args))
        return

    print(machine)
    size = args.layers * args.width**2
    print(f"{args.layers} Linear layers, {size / 1e6:.0f}M weights, {args.rounds} rounds\n")
    rows = []
    times = measure_time(args)
    for name, median in times.items():
        label = name if name.startswith("torch") else f"prunus, {name}"
        ratio = f"{median / times[KTHVALUE]:.2f}"
        memory = f"{measure_memory_in_fresh_process(args, name):.2f}"
        rows.append((label, f"{median:.2f}", ratio, memory))
    print_table(("", "median s", "over kthvalue", "peak extra memory / weights"), rows)


if __name__ == "__main__":
    main()
