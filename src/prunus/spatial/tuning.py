"""Which dataflow is fastest is measured: for each layer, on the user's own scenes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunus.spatial.dataflows import DATAFLOWS
from prunus.spatial.maps import KernelMap

ROUNDS = 3


@torch.no_grad()
def measure(x: Tensor, w: Tensor, kernel_map: KernelMap, rounds: int = ROUNDS) -> dict[str, float]:
    """Dataflow -> seconds, the best of some rounds after one to warm up, in turn."""
    times = dict.fromkeys(DATAFLOWS, float("inf"))
    for round_ in range(rounds + 1):
        for name, dataflow in DATAFLOWS.items():
            _wait(x)
            begin = time.perf_counter()
            dataflow(x, w, kernel_map)
            _wait(x)
            if round_:
                times[name] = min(times[name], time.perf_counter() - begin)
    return times


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def fastest(x: Tensor, w: Tensor, kernel_map: KernelMap) -> str:
    times = measure(x, w, kernel_map)
    return min(times, key=times.__getitem__)


@torch.no_grad()
def tune(
    model: nn.Module, samples: Iterable[Any], path: str | os.PathLike[str] | None = None
) -> dict[str, dict[str, float]]:
    """Measure every sparse convolution on every sample, and set each to its fastest dataflow.

    Returns layer -> dataflow -> seconds in all, and writes it to ``path`` as JSON, which
    `apply_tuning` reads. Samples are what the model is called with.
    """
    totals: dict[str, dict[str, float]] = {}
    handles = []

    def hook(name: str) -> Any:
        def measured(module: Any, args: tuple[Any, ...]) -> None:
            _, kernel_map = module._kernel_map(args[0])
            features, weight = module._cast(args[0].features)
            layer = totals.setdefault(name, dict.fromkeys(DATAFLOWS, 0.0))
            for flow, seconds in measure(features, weight, kernel_map).items():
                layer[flow] += seconds

        return measured

    modules = {name: m for name, m in model.named_modules() if hasattr(m, "dataflow")}
    try:
        for name, module in modules.items():
            handles.append(module.register_forward_pre_hook(hook(name)))
        for sample in samples:
            model(sample)
    finally:
        for handle in handles:
            handle.remove()
    _set(modules, totals)
    if path is not None:
        Path(path).write_text(json.dumps(totals, indent=2) + "\n")
    return totals


def apply_tuning(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Set the dataflows that `tune` found. Raises ValueError for layers that the model lacks."""
    totals = json.loads(Path(path).read_text())
    modules = {name: m for name, m in model.named_modules() if hasattr(m, "dataflow")}
    missing = sorted(totals.keys() - modules.keys())
    if missing:
        raise ValueError(f"'{path}' has {missing[0]!r}, the model has no such sparse convolution")
    _set(modules, totals)


def _set(modules: dict[str, Any], totals: dict[str, dict[str, float]]) -> None:
    for name, times in totals.items():
        modules[name].dataflow = min(times, key=times.__getitem__)
