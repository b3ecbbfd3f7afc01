"""What `prunus bench` prints: every pruned layer, and the whole model before and after."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import RenderableType
from torch import nn
from torch.utils.data import DataLoader

from prunus.accelerating import accelerate
from prunus.calibration import Calibration, undisturbed
from prunus.execution import DENSE, timings


def bench(
    model: nn.Module, batches: Any = None, *, rows: int = 128, device: str = "cpu"
) -> Iterator[RenderableType]:
    """Accelerate the model, and say how long it takes, layer by layer and in all.

    ``batches`` is a batch, or a loader or Calibration, of which the first one counts. Raises
    ValueError for a device that is not there.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}: torch sees no GPU here; use --device cpu")
    model.eval().to(device)
    batch = next(iter(batches)) if isinstance(batches, DataLoader | Calibration) else batches
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
