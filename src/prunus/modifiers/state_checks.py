"""Checks of what runs load, made before any of them has loaded anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from prunus.core.layers import Layer
from prunus.core.masks import check_packed

Kind = type | tuple[type, ...]


def check_fields(state: Mapping[str, Any], **kinds: Kind) -> None:
    """Raises ValueError unless the state has these fields, of these kinds; counts from 0 on."""
    for name, kind in kinds.items():
        if name not in state:
            raise ValueError(f"{name!r} is missing")
        value = state[name]
        fits = isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool)
        if not fits or (kind is int and value < 0):
            raise ValueError(f"{name}={value!r} is no {_words(kind)}")


def _words(kind: Kind) -> str:
    if kind is int:
        return "whole number from 0 on"
    return " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))


def check_counts(name: str, values: Iterable[Any]) -> None:
    """Raises ValueError unless all are whole numbers from 0 on."""
    for value in values:
        check_fields({name: value}, **{name: int})


def check_tensors(name: str, tensors: Mapping[str, Any], layers: Iterable[Layer]) -> None:
    """Raises ValueError unless these are floating tensors, or packed masks, of layers' shapes."""
    shapes = {layer.name: layer.shape for layer in layers}
    for key, value in tensors.items():
        if key not in shapes:
            raise ValueError(f"{name} has {key!r}, which is no layer of this entry")
        if isinstance(value, Mapping):
            shape = check_packed(f"{name}[{key!r}]", value)
        elif isinstance(value, Tensor) and value.is_floating_point():
            shape = tuple(value.shape)
        else:
            raise ValueError(f"{name}[{key!r}] is no tensor of floating numbers")
        if shape != shapes[key]:
            raise ValueError(f"{name}[{key!r}] has shape {shape}, the layer {shapes[key]}")
