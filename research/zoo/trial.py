"""One architecture through every kind of pruning, each on a model of its own."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import prunus

from research.zoo.architectures import Architecture, Batch

TARGET = 0.5
RECIPE = """
modifiers:
  - prune:
      sparsity: {from: 0.2, to: 0.5, curve: cubic}
      window: {from: 1step, to: 3step, every: 1step}
"""
Pruned = tuple[Mapping[str, Tensor], float, Mapping[str, str]]
"""masks by parameter, the sparsity told, and what was left dense, with the reasons"""


def outputs(value: Any) -> Iterator[Tensor]:
    """The floating tensors of an output."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from outputs(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from outputs(part)


def run(model: nn.Module, batch: Batch) -> Any:
    return model(**batch) if isinstance(batch, dict) else model(batch)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """One number that depends on every output."""
    found = [t.double().square().mean() for t in outputs(run(model, batch))]
    # random weights make outputs of any size; the logarithm keeps gradients in a common range
    return torch.stack(found).sum().log1p()


def _at_once(pruner: str | prunus.Pruner, **settings: Any) -> Callable[..., Pruned]:
    def prune(model: nn.Module, data: prunus.Calibration, batch: Batch) -> Pruned:
        result = prunus.prune(model, pruner, calibration=data, **settings)
        return result.masks, result.sparsity, result.spared

    return prune


def _session(model: nn.Module, data: prunus.Calibration, batch: Batch) -> Pruned:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with prunus.attach(model, optimizer, RECIPE, calibration=data) as session:
        for _ in range(3):
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
    return session.masks, session.sparsity, session.runs[0].spared


METHODS: dict[str, Callable[..., Pruned]] = {
    "magnitude": _at_once("magnitude", sparsity=TARGET),
    "2:4": _at_once("magnitude", pattern="2:4"),
    "wanda": _at_once("wanda", sparsity=TARGET),
    "sparsegpt": _at_once("sparsegpt", sparsity=TARGET, sequential=True),
    "cap": _at_once(prunus.CAP(block_size=8, num_grads=16, damp=1e-4), sparsity=TARGET),
    "session": _session,
}


def trial(name: str, architecture: Architecture) -> Iterator[dict[str, Any]]:
    """A row for each method: the share of all weights that is zero, or why it is not."""
    torch.manual_seed(0)
    model, batches = architecture.build().eval(), [architecture.batch() for _ in range(4)]
    for method, prune in METHODS.items():
        began, row = time.monotonic(), {"name": name, "method": method}
        mine = copy.deepcopy(model)
        data = prunus.Calibration(batches, forward=loss)
        try:
            masks, told, spared = prune(mine, data, batches[0])
            row |= {"spared": dict(spared), **counted(model, mine, masks, told)}
            with torch.no_grad():
                if not all(t.isfinite().all() for t in outputs(run(mine.eval(), batches[0]))):
                    row["fault"] = "the outputs are not finite"
        except ValueError as error:
            row["refused"] = str(error)
        except Exception as error:
            row["fault"] = f"{type(error).__name__}: {error}"
        yield row | {"seconds": round(time.monotonic() - began, 2)}


def counted(
    dense: nn.Module, model: nn.Module, masks: Mapping[str, Tensor], told: float
) -> dict[str, Any]:
    """What is zero in the model itself, and a fault where that is not what was asked for.

    A group or row that had more zeros than asked for keeps them; rows of odd length round.
    """
    before, after = zeros(dense, masks), zeros(model, masks)
    size = sum(mask.numel() for mask in masks.values())
    rows = sum(mask.flatten(1).shape[0] for mask in masks.values())
    row: dict[str, Any] = {"share": float(prunus.sparsity(model)), "pruned": len(masks)}
    excess = after - TARGET * size
    if not -rows <= excess <= rows + before or abs(told - after / size) > 1e-6:
        row["fault"] = f"{after} of {size} weights are zero, and {told:.4f} was told"
    return row


def zeros(model: nn.Module, names: Iterable[str]) -> int:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return sum(int((parameters[name] == 0).sum()) for name in names)
