"""Example inputs: a tensor, a tuple of positional arguments, or a mapping of keyword arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


def device_of(model: nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def run(model: nn.Module, example_inputs: Any) -> Any:
    """The model's output; inputs are moved to the device of its parameters."""
    inputs = tree_map_only(Tensor, lambda t: t.to(device_of(model)), example_inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def random_like(example_inputs: Any, seed: int) -> Any:
    """Inputs of the same form: floats are drawn anew, integers are shuffled along the last axis."""
    generator = torch.Generator().manual_seed(seed)

    def draw(t: Tensor) -> Tensor:
        if t.is_floating_point():
            return torch.randn(t.shape, generator=generator).to(t)
        if t.dim() and t.dtype != torch.bool and t.shape[-1] > 1:
            order = torch.randperm(t.shape[-1], generator=generator)
            return t[..., order.to(t.device)]
        return t

    return tree_map_only(Tensor, draw, example_inputs)
