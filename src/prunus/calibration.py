"""Calibration data, and the passes over it that fill statistics."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from prunus.layers import Layer, reshard
from prunus.progress import track
from prunus.stats import Statistic

Batch = Any


@dataclass(frozen=True)
class Calibration:
    """Batches to learn from, and how to run a model on them.

    A batch is a tensor, a pair ``(inputs, targets)``, or a mapping passed as ``model(**batch)``.
    Batches are moved to the model's device; the iterable is re-iterated for each pruning step.
    """

    batches: Iterable[Batch]
    """a DataLoader, a list: anything that can be iterated more than once"""
    loss_fn: Callable[[Any, Any], Tensor] | None = None
    """``loss_fn(output, targets)`` for pairs; without it, an output's own ``.loss`` is used"""
    forward: Callable[[nn.Module, Batch], Any] | None = None
    """``forward(model, batch) -> loss``, instead of all the above"""
    num_batches: int | None = None
    """use only the first so many batches"""

    def __post_init__(self) -> None:
        if isinstance(self.batches, Iterator):
            raise ValueError(
                "calibration batches can be read only once (an iterator or generator); pass a "
                "DataLoader or a list, since every pruning step reads them anew"
            )
        if self.num_batches is not None and self.num_batches < 1:
            raise ValueError(f"num_batches={self.num_batches}; use at least 1")

    def __iter__(self) -> Iterator[Batch]:
        return islice(iter(self.batches), self.num_batches)

    def run(self, model: nn.Module, batch: Batch) -> Any:
        """One forward pass: the loss where there is one, else the output."""
        if self.forward is not None:
            return self.forward(model, batch)
        device = next(model.parameters()).device
        batch = to_device(batch, device)
        if isinstance(batch, Mapping):
            output = model(**batch)
            return getattr(output, "loss", None) if self.loss_fn is None else output
        if isinstance(batch, (tuple, list)):
            inputs, *targets = batch
            output = model(inputs)
            if self.loss_fn is None or not targets:
                return output
            return self.loss_fn(output, targets[0])
        return model(batch)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Tensors in nested tuples, lists and mappings, moved; anything else as it is."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        items = [to_device(item, device) for item in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    return batch


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, with training modes and random states put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices):
        model.eval()
        try:
            yield
        finally:
            reshard(model)
            for module, mode in modes:
                module.training = mode


def measure_inputs(
    model: nn.Module, stats: Mapping[Layer, Statistic], calibration: Calibration
) -> None:
    """Fill the statistics from the layers' inputs, in one pass over the calibration data.

    Raises ValueError for empty data, and for a layer that no batch has reached.
    """
    reached: set[Layer] = set()

    def hook(layer: Layer, stat: Statistic) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def take(module: nn.Module, args: tuple[Any, ...]) -> None:
            stat.update(layer.input_matrix(args[0]))
            reached.add(layer)

        return take

    count = 0
    with contextlib.ExitStack() as stack, undisturbed(model), torch.no_grad():
        for layer, stat in stats.items():
            handle = layer.module.register_forward_pre_hook(hook(layer, stat))
            stack.callback(handle.remove)
        for batch in track(calibration, "calibration"):
            calibration.run(model, batch)
            count += 1
    if count == 0:
        raise ValueError("the calibration data is empty; nothing was pruned")
    if missed := [layer.name for layer in stats if layer not in reached]:
        raise ValueError(
            f"no calibration batch reached {', '.join(missed[:5])}; nothing was pruned"
        )
