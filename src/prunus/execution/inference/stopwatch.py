"""Which of several calls is the fastest: in turn, many times, by medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

SAMPLE = 0.002  # seconds; shorter calls are repeated for so long, or the clock would show
SLOW = 1.0  # seconds for a comparison, from which on it is made with fewer rounds
ROUNDS = (7, 31)
MARGIN = 0.05


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, round by round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)


def timings(calls: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, Timing]:
    """Time each call, in turn, so that what else the machine does falls on all of them alike."""
    for call in calls.values():
        call()  # caches, and the kernels' own choices
    first = {name: _seconds(call, 1, device) for name, call in calls.items()}
    repeats = {name: min(200, max(1, int(SAMPLE / max(s, 1e-7)))) for name, s in first.items()}
    whole = sum(first[name] * repeats[name] for name in calls)
    rounds = int(min(ROUNDS[1], max(ROUNDS[0], SLOW / whole)))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            taken[name].append(_seconds(call, repeats[name], device))
    return {name: Timing(tuple(values)) for name, values in taken.items()}


def _seconds(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    # what one thread computes is counted without what a busy machine lets it wait
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = clock()
    for _ in range(repeats):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (clock() - begin) / repeats


def winner(times: Mapping[str, Timing], standard: str) -> str:
    """The fastest if it beats the standard by more than the noise, else the standard.

    That is by more than `MARGIN` in three of four rounds: what slows the whole machine down falls
    on both sides of a round.
    """
    best = min(times, key=lambda name: times[name].median)
    if best == standard:
        return standard
    pairs = zip(times[standard].rounds, times[best].rounds, strict=True)
    gains = [1 - fast / slow for slow, fast in pairs]
    return best if statistics.quantiles(gains, n=4)[0] > MARGIN else standard
