"""What `prunus bench` prints: every pruned layer, and the whole model before and after."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import RenderableType
from torch import nn

from prunus.api.accelerate import accelerate
from prunus.calibration.calibration import Calibration, undisturbed
from prunus.execution.inference import DENSE, timings


def bench(model: nn.Module, batch: Any = None, *, rows: int = 128) -> Iterator[RenderableType]:
    """Accelerate the model, and say how long it takes, layer by layer and in all.

    It is put in evaluation mode. ``batch`` and ``rows`` are those of `accelerate`.
    """
    model.eval()
    dense = None if batch is None else copy.deepcopy(model)
    accelerated = accelerate(model, batch, rows=rows)
    yield accelerated
    if dense is not None:
        yield _end_to_end(dense, model, batch, accelerated.forms.total() > accelerated.forms[DENSE])


def _end_to_end(dense: nn.Module, sparse: nn.Module, batch: Any, changed: bool) -> str:
    data = Calibration([batch])
    device = next(dense.parameters()).device
    calls = {"dense": lambda: data.run(dense, batch)}
    if changed:
        calls["sparse"] = lambda: data.run(sparse, batch)
    with undisturbed(dense, data), torch.no_grad():
        times = timings(calls, device)
    before = f"whole model: {1e3 * times['dense'].median:.2f} ms"
    if not changed:
        return before
    pairs = zip(times["dense"].rounds, times["sparse"].rounds, strict=True)
    low, middle, high = statistics.quantiles([slow / fast for slow, fast in pairs], n=4)
    after = f"{1e3 * times['sparse'].median:.2f} ms now"
    return f"{before} dense, {after}: {middle:.2f} times as fast (middle half {low:.2f}-{high:.2f})"
