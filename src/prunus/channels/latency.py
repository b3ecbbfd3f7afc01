"""Measured time of a forward pass."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import nn

from prunus.channels.inputs import device_of, run
from prunus.channels.recording import quiet

SECONDS = 0.5
ROUNDS = (5, 50)


def latency(model: nn.Module, example_inputs: Any) -> float:
    """Median milliseconds of a forward pass in evaluation mode, with as many threads as torch uses.

    With one thread its own CPU time counts, which other programs on the machine disturb less.
    """
    device = device_of(model)
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter
    with quiet(model):
        first = _seconds(model, example_inputs, clock, device)
        rounds = int(min(ROUNDS[1], max(ROUNDS[0], SECONDS / max(first, 1e-6))))
        times = [_seconds(model, example_inputs, clock, device) for _ in range(rounds)]
    return 1e3 * statistics.median(times)


def _seconds(model: nn.Module, example_inputs: Any, clock: Any, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = clock()
    run(model, example_inputs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return float(clock() - begin)
