"""What a file that `save` wrote says of itself, checked by a schema, and its tensors made dense."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from prunus import formats
from prunus.core.masks import check_packed, unpack

Count = Annotated[int, Field(ge=0)]


class Stored(BaseModel):
    """A tensor's format; the other fields are options of that format."""

    model_config = ConfigDict(strict=True, extra="allow")

    format: str
    parts: list[str]


class Header(BaseModel):
    """The metadata of a file; that of a file which others wrote is empty."""

    model_config = ConfigDict(strict=True)

    version: Literal[1, 2] = 1
    recipe: str | None = None
    masks: dict[str, list[Count]] = {}
    """parameter name -> positions of kept weights that are zero"""
    compact: dict[str, list[Count]] = {}
    """name -> shape, of tensors that the first version packed"""
    formats: dict[str, Stored] = {}
    aliases: dict[str, str] = {}


def read_header(text: str) -> Header:
    """Raises ValueError that names the key for what `save` cannot have written."""
    try:
        return Header.model_validate(json.loads(text))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "header"
        raise ValueError(f"{key}={first['input']!r}: {first['msg']}") from None
    except ValueError as error:
        raise ValueError(f"the header is no JSON: {error}") from None


def expand(stored: Mapping[str, Tensor], header: Header) -> dict[str, Tensor]:
    """The dense tensors of a file. Raises ValueError that names the tensor."""
    state = dict(stored)
    for name, shape in header.compact.items():
        state[name] = _unpacked(name, shape, _pop(state, name, ["bits", "values"]))
    for name, form in header.formats.items():
        state[name] = _decoded(name, form, _pop(state, name, form.parts))
    for name, other in header.aliases.items():
        if other not in state:
            raise ValueError(f"aliases: {name!r} is tied to {other!r}, which is missing")
        state[name] = state[other]
    return state


def masks_of(state: Mapping[str, Tensor], header: Header) -> dict[str, Tensor]:
    """Keep-masks: where weights are not zero, and the kept zeros."""
    masks = {}
    for name, zeros in header.masks.items():
        if name not in state:
            raise ValueError(f"masks: {name!r} is missing")
        mask = state[name] != 0
        if zeros and max(zeros) >= mask.numel():
            raise ValueError(f"masks: {name!r} has {mask.numel()} weights, none at {max(zeros)}")
        mask.view(-1)[torch.tensor(zeros, dtype=torch.int64)] = True
        masks[name] = mask
    return masks


def _pop(state: dict[str, Tensor], name: str, parts: list[str]) -> dict[str, Tensor]:
    if missing := [part for part in parts if f"{name}.{part}" not in state]:
        raise ValueError(f"'{name}.{missing[0]}' is missing")
    return {part: state.pop(f"{name}.{part}") for part in parts}


def _unpacked(name: str, shape: list[int], parts: Mapping[str, Tensor]) -> Tensor:
    bits, values = parts["bits"], parts["values"]
    check_packed(name, {"shape": shape, "bits": bits})
    keep = unpack(bits, shape)
    if values.dim() != 1 or len(values) != int(keep.sum()):
        raise ValueError(f"{name}: {len(values)} values for {int(keep.sum())} bits")
    dense = torch.zeros(shape, dtype=values.dtype)
    dense[keep] = values
    return dense


def _decoded(name: str, stored: Stored, tensors: Mapping[str, Tensor]) -> Tensor:
    options = dict(stored.model_extra or {})
    shape = options.get("shape")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{name}: shape={shape!r} is no list of sizes")
    try:
        dense = formats.restore(stored.format, tensors, options).decode()
    # whatever a decoder meets in parts that do not fit each other
    except (ArithmeticError, AttributeError, LookupError, MemoryError) as error:
        raise ValueError(f"{name}: broken {stored.format} ({error!r})") from None
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: broken {stored.format} ({error})") from None
    if dense.numel() != prod(shape):
        raise ValueError(f"{name}: {dense.numel()} weights, where shape {shape} has {prod(shape)}")
    return dense
