"""Integers of k bits, packed without gaps: the first in the highest bits of the first byte."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Integers = npt.NDArray[np.integer]
_RAW = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_for(count: int) -> int:
    """Bits that tell `count` things apart: ceil(log2 count)."""
    return max(0, count - 1).bit_length()


def packed_bytes(count: int, width: int) -> int:
    """Bytes that `count` integers of `width` bits take."""
    return -(-count * width // 8)


def pack_bits(values: Integers, width: int) -> npt.NDArray[np.uint8]:
    """Non-negative integers below ``2**width`` -> uint8 of `packed_bytes`; width 0 to 32."""
    count = len(values)
    if width == 8:
        return values.astype(np.uint8)
    if width == 1:
        return np.packbits(values.astype(np.bool_))
    wide = np.uint8 if width < 8 else np.uint16 if width <= 16 else np.uint32
    groups = np.zeros(-(-count // 8) * 8, wide)
    groups[:count] = values
    columns = groups.reshape(-1, 8).T
    packed = np.zeros((len(groups) // 8, width), np.uint8)
    for i, j, shift in _overlaps(width):
        part = columns[i] << -shift if shift < 0 else columns[i] >> shift
        packed[:, j] |= part.astype(np.uint8)
    return packed.reshape(-1)[: packed_bytes(count, width)]


def unpack_bits(packed: npt.NDArray[np.uint8], count: int, width: int) -> Integers:
    """The inverse of `pack_bits`; of the smallest unsigned type that holds the width."""
    if width == 8:
        return packed[:count]
    if width == 1:
        return np.unpackbits(packed, count=count)
    wide = np.uint8 if width < 8 else np.uint16 if width <= 16 else np.uint32
    groups = np.zeros((-(-count // 8), width), np.uint8)
    groups.reshape(-1)[: len(packed)] = packed
    values = np.zeros((len(groups), 8), wide)
    for i, j, shift in _overlaps(width):
        part = groups[:, j].astype(wide)
        values[:, i] |= part >> -shift if shift < 0 else part << shift
    values &= wide((1 << width) - 1)
    return values.reshape(-1)[:count]


def _overlaps(width: int) -> list[tuple[int, int, int]]:
    """(value i, byte j, how far the value's lowest bit lies above the byte's), of eight values.

    Eight values fill `width` bytes; value i covers the bits from i * width to (i + 1) * width.
    """
    return [
        (i, j, (i + 1) * width - 8 * (j + 1))
        for i in range(8)
        for j in range(width)
        if i * width < 8 * (j + 1) and 8 * j < (i + 1) * width
    ]


def raw(t: Tensor) -> Tensor:
    """The tensor's bytes as integers of the same size, sharing its memory.

    Every type can be indexed so, bfloat16 and float8 too.
    """
    return t.view(_RAW[t.dtype.itemsize])


def nonzero(t: Tensor) -> npt.NDArray[np.bool_]:
    """Where a tensor on the CPU is not zero; minus zero, which masks leave behind, is zero."""
    small_float = t.is_floating_point() and t.dtype.itemsize == 1
    result: npt.NDArray[np.bool_] = ((t.float() if small_float else t) != 0).numpy()
    return result
