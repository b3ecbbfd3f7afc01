"""What pruning costs as models, blocks, gradients and ranks grow: predicted, and measured small.

The first tables are arithmetic: models on the meta device, planned by prunus itself, so bytes are
those of `prunus check`. The last one runs every method on a small network, on one process and on
two (gloo), and sets memory and traffic beside the same arithmetic.

    OMP_NUM_THREADS=1 python -m research.benchmarks.scaling
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import prunus

from research.benchmarks.costs import Costs, methods
from research.benchmarks.measure import PeakMemory, add_options, hardware, print_table


@dataclass(frozen=True)
class Case:
    """A model, the tokens of one calibration batch, and how many batches input statistics read."""

    name: str
    build: Callable[[], nn.Module]
    tokens: int
    batches: int
    num_grads: int
    sequential: bool


def vit_h() -> nn.Module:
    import timm

    return timm.create_model("vit_huge_patch14_224")


def llama_70b() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


CASES = (
    Case("ViT-H/14", vit_h, 16 * 257, 128, 4096, sequential=False),
    Case("Llama 3 70B", llama_70b, 2048, 128, 1024, sequential=True),
)


def size(count: float) -> str:
    """Bytes as people read them."""
    if count == 0 or math.isnan(count):
        return "-" if count else "0"
    i = min(4, int(math.log(max(1, count), 1024)))
    value = count / 1024**i
    return f"{value:.{0 if value >= 100 or i == 0 else 1}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[i]}"


def flops(count: float) -> str:
    return "0" if count == 0 else f"{count:.0e}".replace("e+", "e")


def predict(case: Case) -> str:
    """What the methods take on a model that nobody has loaded, as a table."""
    with torch.device("meta"):
        model = case.build()
    itemsize = next(model.parameters()).element_size()
    costs = {
        name: Costs(pruner, model, case.tokens, case.sequential)
        for name, pruner in methods(case.num_grads).items()
    }
    some, budget = costs["magnitude"], 64 * 2**30
    lines = [
        f"{case.name}: {sum(p.numel() for p in model.parameters()) / 1e6:,.0f} M parameters, "
        f"{some.weights / 1e6:,.0f} M of them pruned, in {len(some.layers)} layers.",
        "",
        "| method | statistics, 1 rank | of 8 | of 64 | readings | sent, DDP | sent, FSDP2 "
        "| measuring | solving |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, cost in costs.items():
        cells = (
            name,
            *(size(cost.statistics(ranks)) for ranks in (1, 8, 64)),
            " / ".join(str(cost.readings(ranks, budget)) for ranks in (1, 8, 64)),
            *(size(cost.sent(8, how, itemsize)) for how in ("ddp", "fsdp")),
            flops(cost.measuring(case.batches)),
            flops(cost.solving()),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


# the small case

WIDTH, DEPTH, EXAMPLES, GRADS = 384, 2, 16, 192


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(m for _ in range(DEPTH) for m in (nn.Linear(WIDTH, WIDTH), nn.Tanh())),
        nn.Linear(WIDTH, 8),
    )


class Traffic:
    """Counts the bytes that leave this rank in prunus' collectives."""

    def __init__(self) -> None:
        self.sent = 0.0
        self.originals = {n: getattr(dist, n) for n in ("all_reduce", "all_to_all_single")}

    def all_reduce(self, t: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        ranks = dist.get_world_size()
        self.sent += 2 * t.nbytes * (ranks - 1) / ranks
        return self.originals["all_reduce"](t, *args, **kwargs)

    def all_to_all_single(
        self, got: torch.Tensor, sent: torch.Tensor, out: Any, sizes: Sequence[int], *args: Any
    ) -> Any:
        self.sent += (sent.numel() - sizes[dist.get_rank()]) * sent.element_size()
        return self.originals["all_to_all_single"](got, sent, out, sizes, *args)

    def __enter__(self) -> Traffic:
        for name in self.originals:
            setattr(dist, name, getattr(self, name))
        return self

    def __exit__(self, *_: object) -> None:
        for name, original in self.originals.items():
            setattr(dist, name, original)


def wrapped(how: str) -> nn.Module:
    model = small()
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if how == "fsdp":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
    return model


def measure(rank: int, ranks: int, how: str, store: str, answers: Any) -> None:
    """All methods, in this process; what each took goes to the queue."""
    torch.set_num_threads(1)
    if ranks > 1:
        file = dist.FileStore(store, ranks)
        dist.init_process_group("gloo", store=file, rank=rank, world_size=ranks)
    generator = torch.Generator().manual_seed(rank)
    batches = [torch.randn(EXAMPLES, WIDTH, generator=generator) for _ in range(GRADS)]
    data = prunus.Calibration(batches, forward=lambda model, x: model(x).square().mean())
    prunus.prune(wrapped(how), "magnitude", sparsity=0.5)  # imports and first allocations
    for name, pruner in methods(GRADS).items():
        pruner = replace(pruner, damp=1e-4) if hasattr(pruner, "num_grads") else pruner
        model = wrapped(how)
        begin = time.perf_counter()
        with PeakMemory("cpu", anonymous=True) as memory, Traffic() as traffic:
            prunus.prune(model, pruner, sparsity=0.5, calibration=data)
        answers.put((how, rank, name, memory.extra, traffic.sent, time.perf_counter() - begin))
    if ranks > 1:
        dist.destroy_process_group()


def measured() -> list[tuple[str, ...]]:
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"}
    spawn = multiprocessing.get_context("spawn")
    answers, found = spawn.SimpleQueue(), []
    for how, ranks in (("one", 1), ("ddp", 2), ("fsdp", 2)):
        with tempfile.TemporaryDirectory() as folder:
            args = (ranks, how, f"{folder}/store", answers)
            processes = [spawn.Process(target=measure, args=(r, *args)) for r in range(ranks)]
            for process in processes:
                process.start()
            found += [answers.get() for _ in range(ranks * len(methods(GRADS)))]
            for process in processes:
                process.join()
    rows = []
    for name, pruner in methods(GRADS).items():
        cost = Costs(pruner, small(), EXAMPLES, sequential=False)
        for how, ranks in (("one", 1), ("ddp", 2), ("fsdp", 2)):
            mine = [answer for answer in found if answer[0] == how and answer[2] == name]
            peak, sent, took = (max(answer[i] for answer in mine) for i in (3, 4, 5))
            rows.append(
                (
                    name,
                    {"one": "1", "ddp": "2, DDP", "fsdp": "2, FSDP2"}[how],
                    size(cost.statistics(ranks)),
                    size(peak),
                    size(cost.sent(ranks, how, 4)),
                    size(sent),
                    f"{took:.2f}",
                )
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_options(parser)
    parser.add_argument("--predict", action="store_true", help="only what needs no measuring")
    args = parser.parse_args()
    print(hardware(args))
    for case in CASES:
        print(predict(case))
    if args.predict:
        return
    print(f"\nMeasured: {DEPTH} layers of {WIDTH} x {WIDTH}, {GRADS} batches of {EXAMPLES}\n")
    header = ("method", "ranks", "statistics", "peak", "sent, predicted", "sent", "s")
    print_table(header, measured())


if __name__ == "__main__":
    main()
