"""What a calibration batch is made of: what the model is called with, and what the loss is told."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from prunus.core.names import did_you_mean, few
from prunus.core.wrappers import unwrap

Batch = Any
_NAMED = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
_PLACED = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
FORWARD = "say how to run it, as Calibration(batches, forward=lambda model, batch: ...)"


class Call(NamedTuple):
    """How a model is run on a batch."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any = None
    """what a loss function is given beside the output"""


class Signature:
    """What a model's forward takes."""

    def __init__(self, model: nn.Module) -> None:
        module = unwrap(model)
        self.name = type(module).__name__
        try:
            parameters = list(inspect.signature(module.forward).parameters.values())
        except (TypeError, ValueError):  # a scripted one does not tell
            parameters = list(inspect.signature(nn.Module.__call__).parameters.values())[1:]
        kinds = {p.kind for p in parameters}
        self.any_key = inspect.Parameter.VAR_KEYWORD in kinds
        self.any_count = inspect.Parameter.VAR_POSITIONAL in kinds
        self.keys = [p.name for p in parameters if p.kind in _NAMED]
        self.placed = [p.name for p in parameters if p.kind in _PLACED]
        self.needed = sum(p.kind in _PLACED and p.default is p.empty for p in parameters)

    def takes(self, count: int) -> bool:
        """Whether so many arguments are surely its inputs: it needs them, or masks follow."""
        if self.needed > count:
            return False
        more = self.placed[max(1, self.needed) : count]
        return count <= len(self.placed) and all(name.endswith("mask") for name in more)

    def __str__(self) -> str:
        return f"{self.name}.forward({', '.join(self.placed or self.keys)})"


def tensors_in(batch: Batch) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and mappings."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping | tuple | list):
        for item in batch.values() if isinstance(batch, Mapping) else batch:
            yield from tensors_in(item)


def to_device(batch: Batch, device: torch.device, copy: bool = False) -> Batch:
    """Tensors in nested tuples, lists and mappings, moved; anything else as it is.

    With ``copy`` nothing that is done to the result is done to the batch.
    """
    if isinstance(batch, Tensor):
        moved = batch.to(device, non_blocking=True)
        return moved.clone() if copy and moved is batch else moved
    if isinstance(batch, Mapping):
        return {key: to_device(value, device, copy) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        items = [to_device(item, device, copy) for item in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    return batch


def call_of(model: nn.Module, batch: Batch, with_loss: bool) -> Call:
    """How to run the model on a batch; ``with_loss`` says that a loss function will have the rest.

    A tensor is the input. A mapping is passed by keyword; keys that forward does not take are for
    the loss function. Of a tuple the last is the target, if there are more parts than inputs; the
    others are inputs, where forward surely takes as many. Raises ValueError, with what to do, for
    anything that leaves it open.
    """
    refuse_unreadable(batch)
    if isinstance(batch, Mapping):
        return _by_key(Signature(model), batch, with_loss)
    if not isinstance(batch, tuple | list):
        return Call((batch,), {})
    signature = Signature(model)
    inputs, target = _parts(signature, list(batch), with_loss)
    first = inputs[0]
    if len(inputs) == 1 and isinstance(first, Mapping) and set(first) <= set(signature.keys):
        return Call((), dict(first), target)
    return Call(tuple(inputs), {}, target)


def _by_key(signature: Signature, batch: Mapping[str, Any], with_loss: bool) -> Call:
    unknown = [] if signature.any_key else [key for key in batch if key not in signature.keys]
    if unknown and not with_loss:
        hint = did_you_mean(unknown[0], signature.keys)
        raise ValueError(
            f"calibration batches have {few([repr(key) for key in unknown])}, which {signature} "
            f"does not take{hint}; drop that from the batches, give a loss_fn(output, batch) that "
            f"reads it, or {FORWARD}"
        )
    kwargs = {key: value for key, value in batch.items() if key not in unknown}
    if kwargs.get("use_cache"):  # passes must not know of each other
        kwargs["use_cache"] = False
    return Call((), kwargs, batch)


def _parts(signature: Signature, batch: list[Any], with_loss: bool) -> tuple[list[Any], Any]:
    """Inputs and target of a batch that is a sequence."""
    count = len(batch)
    if count == 1:
        return batch, None
    if signature.needed == count and not signature.any_count:
        return batch, None
    if count == 2 and signature.needed <= 1:
        return batch[:1], batch[1]
    if not signature.any_count and signature.takes(count - 1):
        return batch[:-1], batch[-1]
    what = "inputs and targets" if with_loss else "inputs"
    raise ValueError(
        f"calibration batches have {count} parts, and {signature} does not tell which are "
        f"{what}; give pairs (inputs, targets), mappings by the names of its arguments, or "
        f"{FORWARD}"
    )


def refuse_unreadable(batch: Batch) -> None:
    """Raises ValueError, with what to do, for text, arrays and numbers where tensors belong."""
    if isinstance(batch, Mapping) and next(tensors_in(batch), None) is not None:
        return  # what forward does with the rest is its business
    if isinstance(batch, Mapping | tuple | list) and not batch:
        raise ValueError("a calibration batch is empty: it has no parts")
    values = list(batch.values()) if isinstance(batch, Mapping) else [batch]
    leaves = [_first_leaf(value) for value in values]
    kind = type(leaves[0]).__name__
    if any(isinstance(leaf, str | bytes) for leaf in leaves):
        raise ValueError(
            "calibration batches hold text; make tokens of it first, as tokenizer(texts, "
            f'return_tensors="pt", padding=True) does, or {FORWARD}'
        )
    if any(isinstance(leaf, np.ndarray | np.generic) for leaf in leaves):
        raise ValueError("calibration batches hold numpy arrays; use torch.as_tensor on them")
    if all(leaf is None or isinstance(leaf, bool | int | float) for leaf in leaves):
        raise ValueError(
            f"calibration batches hold {kind} where tensors belong; give tensors, pairs (inputs, "
            f"targets) or mappings, or {FORWARD}"
        )


def _first_leaf(value: Any) -> Any:
    """What the first parts of parts are in the end; of an empty part, None."""
    while isinstance(value, tuple | list):
        value = value[0] if value else None
    return value
