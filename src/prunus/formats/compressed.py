"""Compressed sparse rows and columns: values, their indices, and where each line begins."""

from __future__ import annotations

from dataclasses import dataclass

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

POINTER_BITS = 32


def _size(mask: Mask, value_bits: int) -> int:
    lines, width = mask.shape
    pointers = POINTER_BITS * (int(lines) + 1)
    return int(mask.sum()) * (value_bits + bits_for(width)) + pointers


@dataclass(frozen=True, eq=False)
class CSR(Encoded):
    """d * (b + ceil(log2 columns)) bits a weight, and 32 for the start of each row."""

    name = "csr"
    pointers: Tensor
    """(rows + 1,) int32"""
    indices: Tensor
    """the column of each value, packed in ceil(log2 columns) bits"""
    values: Tensor

    @classmethod
    def encode(cls, t: Tensor) -> CSR:
        return cls(tuple(t.shape), *_compress(as_matrix(t)))

    @staticmethod
    def size(mask: Mask, value_bits: int) -> int:
        return _size(mask, value_bits)

    def decode(self) -> Tensor:
        lines, width = matrix_shape(self.shape)
        dense = _expand(self.pointers, self.indices, self.values, lines, width)
        return dense.reshape(self.shape)

    def parts(self) -> dict[str, int]:
        _, width = matrix_shape(self.shape)
        return _parts(self.pointers, self.values, width)


@dataclass(frozen=True, eq=False)
class CSC(Encoded):
    """CSR of the transposed matrix: the rows of a column's values, and where columns begin."""

    name = "csc"
    pointers: Tensor
    """(columns + 1,) int32"""
    indices: Tensor
    """the row of each value, packed in ceil(log2 rows) bits"""
    values: Tensor

    @classmethod
    def encode(cls, t: Tensor) -> CSC:
        return cls(tuple(t.shape), *_compress(as_matrix(t).T.contiguous()))

    @staticmethod
    def size(mask: Mask, value_bits: int) -> int:
        return _size(mask.T, value_bits)

    def decode(self) -> Tensor:
        width, lines = matrix_shape(self.shape)
        dense = _expand(self.pointers, self.indices, self.values, lines, width)
        return dense.T.contiguous().reshape(self.shape)

    def parts(self) -> dict[str, int]:
        width, _ = matrix_shape(self.shape)
        return _parts(self.pointers, self.values, width)


def _compress(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mask = nonzero(matrix)
    flat = np.flatnonzero(mask)
    if len(flat) >= 1 << 31:
        raise ValueError(f"{len(flat)} values are too many for {POINTER_BITS}-bit pointers")
    pointers = counts_to_pointers(np.count_nonzero(mask, axis=1))
    width = matrix.shape[1]
    columns = flat - np.repeat(np.arange(len(matrix)) * width, np.diff(pointers))
    values = raw(matrix).reshape(-1)[torch.from_numpy(flat)].view(matrix.dtype)
    return tensor(pointers), tensor(pack_bits(columns, bits_for(width))), values


def _expand(pointers: Tensor, indices: Tensor, values: Tensor, lines: int, width: int) -> Tensor:
    columns = unpack_bits(indices.numpy(), len(values), bits_for(width))
    begins = np.repeat(np.arange(lines) * width, np.diff(pointers.numpy()))
    result = torch.zeros(lines * width, dtype=values.dtype)
    raw(result)[torch.from_numpy(begins + columns)] = raw(values)
    return result.reshape(lines, width)


def _parts(pointers: Tensor, values: Tensor, width: int) -> dict[str, int]:
    return {
        "pointers": POINTER_BITS * len(pointers),
        "indices": len(values) * bits_for(width),
        "values": len(values) * value_bits(values),
    }
