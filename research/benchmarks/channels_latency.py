"""Half the width, one thread: what is promised by multiply-accumulates, and what is measured.

Dense and small model are timed in turn, by the CPU time of the thread (``--threads 1``) and the
smallest of the rounds. The time to find the groups stands beside Torch-Pruning's, where that is
installed. The lecture's table: MobileNet-V1 at 0.75 of its width.

    python -m research.benchmarks.channels_latency --threads 1
"""

from __future__ import annotations

import argparse
import copy
import time
from typing import Any

import timm
import torch
from torch import nn

from prunus.channels import channels, shrink

from research.benchmarks.measure import add_options, hardware, print_table

# model, the speed-up expected at half the width
MODELS = {
    "resnet18": 2.69,
    "resnet50": 3.12,
    "vit_tiny_patch16_224": 2.56,
    "convnext_atto": 2.24,
    "mobilenetv3_small_100": 1.45,
}


def half(model: nn.Module, x: torch.Tensor, keep: float, heads: bool) -> Any:
    """Every group at this share of its units; heads stay unless asked for."""
    found = channels(model, x)
    table = {g.name: 1 - keep for g in found.groups if heads or g.kind == "channel"}
    return shrink(
        model, x, "magnitude", allocator=table, layers=list(table), width=True, measure=False
    )


def milliseconds(models: list[nn.Module], x: torch.Tensor, rounds: int) -> list[float]:
    best = [float("inf")] * len(models)
    with torch.no_grad():
        for model in models:
            model(x)
        for _ in range(rounds):
            for i, model in enumerate(models):
                begin = time.thread_time()
                model(x)
                best[i] = min(best[i], 1e3 * (time.thread_time() - begin))
    return best


def seconds(run: Any, rounds: int = 3) -> float:
    best = float("inf")
    for _ in range(rounds):
        begin = time.thread_time()
        run()
        best = min(best, time.thread_time() - begin)
    return best


def graph_seconds(model: nn.Module, x: torch.Tensor) -> str:
    """Torch-Pruning's time to build its graph and list all groups."""
    try:
        import torch_pruning as tp
    except ImportError:
        return "-"

    def run() -> None:
        graph = tp.DependencyGraph().build_dependency(model, example_inputs=x)
        list(graph.get_all_groups())

    return f"{seconds(run):.2f}"


def row(name: str, expected: float, args: argparse.Namespace) -> tuple[str, ...]:
    torch.manual_seed(0)
    model: Any = timm.create_model(name).eval()
    x = torch.randn(1, *model.default_cfg["input_size"])
    ours, theirs = seconds(lambda: channels(model, x)), graph_seconds(model, x)
    small = copy.deepcopy(model)
    result = half(small, x, 0.5, heads="vit" in name)
    dense_ms, small_ms = milliseconds([model, small], x, args.rounds)
    macs = result.before.macs / result.after.macs
    return (
        name,
        f"{macs:.2f}",
        f"{result.before.params / result.after.params:.2f}",
        f"{dense_ms:.1f}",
        f"{small_ms:.1f}",
        f"{dense_ms / small_ms:.2f}",
        f"{expected:.2f}",
        f"{ours:.2f}",
        theirs,
    )


class MobileNetV1(nn.Module):
    """A. Howard et al., "MobileNets", 2017, https://arxiv.org/abs/1704.04861, table 1."""

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        sizes = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)]
        sizes += [(512, 1)] * 5 + [(1024, 2), (1024, 1)]
        last = int(32 * width)
        layers = [nn.Conv2d(3, last, 3, 2, 1, bias=False), nn.BatchNorm2d(last), nn.ReLU()]
        for channels_out, stride in sizes:
            new = int(channels_out * width)
            layers += [nn.Conv2d(last, last, 3, stride, 1, groups=last, bias=False)]
            layers += [nn.BatchNorm2d(last), nn.ReLU(), nn.Conv2d(last, new, 1, bias=False)]
            layers += [nn.BatchNorm2d(new), nn.ReLU()]
            last = new
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(last, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def lecture() -> None:
    """MobileNet-V1 whole and at 0.75 of its width: built so, and shrunk to it."""
    x = torch.randn(1, 3, 224, 224)
    whole, narrow = MobileNetV1().eval(), MobileNetV1(0.75).eval()
    counts = [channels(m, x).costs.total("macs") / 1e6 for m in (whole, narrow)]
    result = half(whole, x, 0.75, heads=False)
    print(
        f"MobileNet-V1: {counts[0]:.2f} M, at 0.75 of the width {counts[1]:.2f} M "
        f"({counts[0] / counts[1]:.3f}x), shrunk to it {result.after.macs / 1e6:.2f} M\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add_options(parser)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    args = parser.parse_args()
    print(hardware(args), "\n")
    lecture()
    header = ("model", "MACs", "parameters", "dense ms", "small ms", "times", "expected")
    header += ("groups s", "torch-pruning s")
    print_table(header, [row(name, MODELS[name], args) for name in args.models])


if __name__ == "__main__":
    main()
