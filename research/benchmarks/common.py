"""What all benchmarks share: a line about the machine, and tables in Markdown."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch


def hardware(device: str) -> str:
    """CPU, cores, torch and, with cuda, the GPU."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].split(":", 1)[1].strip() if models else cpu
    line = f"{cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    return f"{line}, {torch.cuda.get_device_name()}" if device == "cuda" else line


def seconds(run: Callable[[], object], device: str) -> float:
    """Wall time of one call; what the GPU has been given is waited for on both ends."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


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
