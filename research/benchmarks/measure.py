"""What all benchmarks share: a line about the machine, and tables in Markdown."""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

Row = tuple[str, str, str, str, str]
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


def compare(
    name: str,
    mine: Callable[[], object],
    theirs: Callable[[], object],
    args: argparse.Namespace,
    goal: str,
    times: float = 1.0,
) -> Row:
    """Seconds of both, in turn; `theirs` is a share ``1 / times`` of the whole."""
    pairs = [(seconds(mine, args), seconds(theirs, args) * times) for _ in range(args.rounds)]
    fast, slow = (statistics.median(side) for side in zip(*pairs, strict=True))
    return name, f"{fast:.2f}", f"{slow:.2f}", f"{slow / fast:.1f}", goal


class PeakMemory:
    """The most memory used inside the block beyond what was used at its beginning, in bytes.

    With `anonymous`, pages of files that are mapped are not counted.
    """

    def __init__(self, device: str, anonymous: bool = False) -> None:
        self.cuda, self.extra, self._stop = device == "cuda", 0, threading.Event()
        self.anonymous = anonymous

    def resident(self) -> int:
        if self.cuda:
            return torch.cuda.memory_allocated()
        _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
        return (resident - shared * self.anonymous) * resource.getpagesize()

    def __enter__(self) -> PeakMemory:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        self._before, self._peak = self.resident(), 0
        self._most_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.is_set():
            self._peak = max(self._peak, self.resident())
            time.sleep(0.001)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        peak = torch.cuda.max_memory_allocated() if self.cuda else self._peak
        # the kernel's own maximum misses nothing between two samples, if it was reached in here
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if not self.cuda and not self.anonymous and most > self._most_before:
            peak = max(peak, 1024 * most)
        self.extra = peak - self._before


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
