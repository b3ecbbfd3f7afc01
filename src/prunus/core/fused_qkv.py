"""Q, K and V inside one fused weight: ``attn.qkv[q]`` is the first third of its rows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from prunus.core.layers import Layer
from prunus.core.pieces import Piece
from prunus.core.wrappers import is_sharded

THIRDS = "qkv"
# these stack all of q, then all of k, then all of v
_STACKED = ("qkv", "c_attn", "Wqkv", "to_qkv", "in_proj_weight")
_THIRD = re.compile(r"(.*)\\?\[([qkv])\\?\]")


def split_third(pattern: str) -> tuple[str, str]:
    """``attn.qkv[q]`` -> (``attn.qkv``, ``q``); a pattern without a third, and an empty string."""
    match = _THIRD.fullmatch(pattern)
    return (match[1].removesuffix("\\"), match[2]) if match else (pattern, "")


def third_of(layer: Layer, letter: str, parents: dict[str, nn.Module]) -> Layer:
    """The rows of q, k or v. ``parents`` are the modules by name.

    Raises ValueError for a layer that does not hold them one after the other.
    """
    if message := _no_thirds(layer, parents):
        raise ValueError(f"{layer.name}[{letter}]: {message}")
    return _thirds(layer)[THIRDS.index(letter)]


def qkv_parts(layer: Layer) -> list[Layer]:
    """Q, k and v of a fused weight, as layers of their own; nothing if it is one of these."""
    return _thirds(layer) if layer.piece is None else []


def _thirds(layer: Layer) -> list[Layer]:
    pieces = [Piece("third", i, 3, layer.rows_dim) for i in range(3)]
    return [
        replace(layer, name=f"{layer.name}[{x}]", piece=piece)
        for x, piece in zip(THIRDS, pieces, strict=True)
    ]


def _no_thirds(layer: Layer, parents: dict[str, nn.Module]) -> str:
    parent, _, last = layer.name.rpartition(".")
    if last not in _STACKED:
        return f"{last!r} is not known to stack q, k and v; prune the whole layer, or another"
    # MaxViT, TinyViT and GPTBigCode cut each head's rows in three, not the whole
    holder: Any = parents.get(parent)
    by_head = getattr(holder, "head_first", False) or hasattr(holder, "key_dim")
    if by_head or (last == "c_attn" and layer.kind != "Conv1D"):
        return "q, k and v lie head by head here, not in thirds; prune the whole layer"
    if is_sharded(layer.weight):
        return "the weight is sharded, and a shard is no third; prune the whole layer, or use DDP"
    rows, cols = layer.matrix_shape()
    if rows != 3 * cols:
        return f"{rows} outputs of {cols} inputs are no three square parts; prune the whole layer"
    return ""


def subtract(layer: Layer, gone: Sequence[Layer], parents: dict[str, nn.Module]) -> list[Layer]:
    """What is left of a layer: itself, nothing, or the thirds that are not gone."""
    parts = {g.part_key for g in gone if g.weight is layer.weight}
    if not parts or (layer.part_key is not None and not parts & {None, layer.part_key}):
        return [layer]
    if layer.part_key is not None or None in parts:
        return []
    return [third_of(layer, x, parents) for i, x in enumerate(THIRDS) if i not in parts]
