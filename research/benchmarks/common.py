"""What all benchmarks share: a line about the machine, and tables in Markdown."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def hardware(args: argparse.Namespace) -> str:
    """CPU, cores, torch and, with cuda, the GPU. Sets the number of threads that was asked for."""
    if args.threads:
        torch.set_num_threads(args.threads)
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].split(":", 1)[1].strip() if models else cpu
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} cores used"
    gpu = f", {torch.cuda.get_device_name()}" if args.device == "cuda" else ""
    return f"{cpu}, {threads}, torch {torch.__version__}{gpu}; {args.clock} time"


def add_options(parser: argparse.ArgumentParser) -> None:
    """--device, --threads and --clock."""
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="default: as many as torch takes")
    parser.add_argument(
        "--clock",
        default="wall",
        choices=CLOCKS,
        help="cpu counts this process's CPU time, for a machine that is busy with other things; "
        "use it with --threads 1",
    )


def seconds(run: Callable[[], object], args: argparse.Namespace) -> float:
    """The time of one call; what the GPU has been given is waited for on both ends."""
    clock = CLOCKS[args.clock]
    if args.device == "cuda":
        torch.cuda.synchronize()
    begin = clock()
    run()
    if args.device == "cuda":
        torch.cuda.synchronize()
    return clock() - begin


def spread(values: Sequence[float]) -> str:
    """The middle half of some ratios, ``0.99-1.02``."""
    low, _, high = statistics.quantiles(values, n=4)
    return f"{low:.3f}-{high:.3f}"


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print("| " + " | ".join(header) + " |")
    print("|" + " --- |" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()
