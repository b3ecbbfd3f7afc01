"""Block compressed sparse rows: whole blocks, a column index for each, a pointer for each row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunus.formats.base import (
    Encoded,
    Mask,
    as_matrix,
    counts_to_pointers,
    matrix_shape,
    tensor,
    value_bits,
)
from prunus.formats.bits import bits_for, nonzero, pack_bits, raw, unpack_bits
from prunus.formats.compressed import POINTER_BITS

BLOCK = (4, 4)


@dataclass(frozen=True, eq=False)
class Block(Encoded):
    """Share of blocks * (b + ceil(log2 blocks in a row) / block size) bits a weight."""

    name = "block"
    block: tuple[int, int]
    """rows and columns of a block"""
    pointers: Tensor
    """(rows of blocks + 1,) int32"""
    indices: Tensor
    """which column of blocks, packed"""
    values: Tensor
    """(blocks, block rows * block columns)"""

    @classmethod
    def encode(cls, t: Tensor, block: tuple[int, int] = BLOCK) -> Block:
        matrix = as_matrix(t)
        _check(matrix.shape, block)
        tiles = _tiles(raw(matrix), block)
        kept = _any(nonzero(matrix), block)
        pointers = counts_to_pointers(np.count_nonzero(kept, axis=1))
        columns = np.nonzero(kept)[1]
        values = tiles[torch.from_numpy(kept)].view(t.dtype)
        indices = tensor(pack_bits(columns, bits_for(kept.shape[1])))
        return cls(tuple(t.shape), block, tensor(pointers), indices, values)

    @staticmethod
    def size(mask: Mask, value_bits: int, block: tuple[int, int] = BLOCK) -> int:
        _check(mask.shape, block)
        kept = _any(mask, block)
        each = block[0] * block[1] * value_bits + bits_for(kept.shape[1])
        return int(kept.sum()) * each + POINTER_BITS * (len(kept) + 1)

    def decode(self) -> Tensor:
        rows, cols = matrix_shape(self.shape)
        r, c = self.block
        lines, width = rows // r, cols // c
        columns = unpack_bits(self.indices.numpy(), len(self.values), bits_for(width))
        begins = np.repeat(np.arange(lines) * width, np.diff(self.pointers.numpy()))
        tiles = torch.zeros(lines * width, r * c, dtype=self.values.dtype)
        raw(tiles)[torch.from_numpy(begins + columns)] = raw(self.values)
        return tiles.reshape(lines, width, r, c).transpose(1, 2).reshape(self.shape)

    def parts(self) -> dict[str, int]:
        width = matrix_shape(self.shape)[1] // self.block[1]
        return {
            "pointers": POINTER_BITS * len(self.pointers),
            "indices": len(self.values) * bits_for(width),
            "values": self.values.numel() * value_bits(self.values),
        }

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], options: Mapping[str, Any]) -> Encoded:
        return super().restore(tensors, {**options, "block": tuple(options["block"])})


def _check(shape: tuple[int, ...], block: tuple[int, int]) -> None:
    r, c = block
    if min(r, c) < 1 or shape[0] % r or shape[1] % c:
        raise ValueError(
            f"block {r}x{c} does not divide a matrix of {shape[0]}x{shape[1]}; use a block that "
            "does, or 'csr'"
        )


def _tiles(matrix: Tensor, block: tuple[int, int]) -> Tensor:
    """(rows of blocks, columns of blocks, block size)."""
    r, c = block
    lines, width = matrix.shape[0] // r, matrix.shape[1] // c
    return matrix.reshape(lines, r, width, c).transpose(1, 2).reshape(lines, width, r * c)


def _any(mask: Mask, block: tuple[int, int]) -> Mask:
    r, c = block
    lines, width = mask.shape[0] // r, mask.shape[1] // c
    result: Mask = np.logical_or.reduce(mask.reshape(lines, r, width, c), axis=(1, 3))
    return result
