"""Weights that other weights share memory with, and those that cannot be written to at all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from prunus.core.layers import Layer, all_layers, weights_of
from prunus.core.masks import local
from prunus.core.shared_memory import overlapping, shares_with_itself, storage_of
from prunus.core.wrappers import clean_name, clean_parameters, unwrap


def tied_names(model: nn.Module) -> dict[str, str]:
    """Names of weights that are no layers of their own: the name under which each is one.

    Tied weights are known by the first of their names; empty ones are no layer, and have none.
    """
    first = {storage_of(layer.weight): layer.parameter_name for layer in all_layers(model)}
    found = {}
    for full_name, module in unwrap(model).named_modules():
        for attribute, *_ in weights_of(module):
            weight, name = getattr(module, attribute), clean_name(full_name)
            name = f"{name}.{attribute}" if name else attribute
            if isinstance(weight, nn.Parameter) and first.get(storage_of(weight), "") != name:
                found[name] = first.get(storage_of(weight), "")
    return found


def refuse_overlaps(model: nn.Module, layers: Sequence[Layer]) -> None:
    """Raises ValueError for a chosen weight of which another parameter has a part, and not all."""
    parameters = {
        name: local(p.detach())
        for name, p in clean_parameters(model).items()
        if not nn.parameter.is_lazy(p)
    }
    for name, other in overlapping(parameters, [layer.parameter_name for layer in layers]):
        raise ValueError(
            f"{name} and {other} share a part of their memory, so pruning one would change the "
            f"other; give {name} memory of its own (nn.Parameter(weight.detach().clone())), or "
            "exclude it"
        )


def not_writable(weight: Tensor) -> str:
    """Why pruning cannot write to a weight, as what follows its name; empty if it can."""
    if weight.is_inference() and not torch.is_inference_mode_enabled():
        return (
            "was made inside torch.inference_mode, so nothing may write to it; make or load the "
            "model outside of that (torch.no_grad does as well)"
        )
    if shares_with_itself(local(weight.detach())):
        return (
            "has one memory for several entries (was it expanded?); give each its own with "
            "nn.Parameter(weight.detach().clone()), or exclude it"
        )
    return ""
