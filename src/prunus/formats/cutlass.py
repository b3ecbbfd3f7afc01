"""2:4 in the layout of CUTLASS, which core torch hands to sparse tensor cores.

The same values and places as `NM`, but four (16-bit values) or eight (8-bit) groups share one
metadata integer, the first in its lowest bits, and those integers lie in an interleaved order.
32-bit values are 1:2, each standing as the two halves of a group of four.
See `tools/util/include/cutlass/util/host_reorder.h` in https://github.com/NVIDIA/cutlass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunus.formats.base import as_matrix, matrix_shape, tensor
from prunus.formats.bits import bits_for, unpack_bits
from prunus.formats.nm import NM

_META = {1: torch.int32, 2: torch.int16, 4: torch.int16}


def pack_cutlass(w: Tensor) -> tuple[Tensor, Tensor]:
    """A (rows, columns) 2:4 matrix -> its values (rows, columns / 2) and its metadata.

    Equal to what core torch packs, bit for bit. Raises ValueError for a matrix that is not 2:4
    (1:2 in float32) or whose shape no tensor core takes.
    """
    w = as_matrix(w)
    rows, cols = w.shape
    meta_type = _META.get(w.dtype.itemsize)
    if meta_type is None:
        raise ValueError(f"tensor cores take no 2:4 matrix of {w.dtype}; use float16 or int8")
    wide = w.dtype.itemsize == 4
    per_meta = 2 * meta_type.itemsize
    # metadata is stored in pairs of columns
    need = (16, 64) if meta_type == torch.int32 else (32, 16 if wide else 32)
    if rows % need[0] or cols % need[1]:
        raise ValueError(
            f"a 2:4 matrix of {w.dtype} needs multiples of {need[0]}x{need[1]}, not {rows}x{cols}"
        )
    packed = NM.encode(w, 1, 2) if wide else NM.encode(w, 2, 4)
    nibbles = _nibbles(packed).reshape(rows, -1, per_meta)
    shifts = 4 * torch.arange(per_meta)
    meta = (nibbles << shifts).sum(-1)
    order = interleaved(rows, meta.shape[1], meta_type)
    result = torch.empty(meta.numel(), dtype=meta_type)
    result[order.reshape(-1)] = meta.reshape(-1).to(meta_type)
    return packed.values, result.reshape(meta.shape)


def _nibbles(packed: NM) -> Tensor:
    """(groups,) four bits for each group: the first place in the low two, the second above."""
    places = unpack_bits(packed.places.numpy(), packed.values.numel(), bits_for(packed.m))
    places = places.astype("int64")
    if packed.m == 2:
        return tensor(4 + 10 * places)  # halves 0 and 1 are 0b0100, halves 2 and 3 are 0b1110
    first, second = places.reshape(-1, 2).T
    return tensor(first | second << 2)


def interleaved(rows: int, cols: int, meta_type: torch.dtype) -> Tensor:
    """(rows, cols) where CUTLASS stores each metadata integer.

    Rows are dealt out within groups, 2x2 squares are transposed, and the matrix is stored in
    pairs of columns, one pair after the other.
    """
    group, step = (32, 4) if meta_type == torch.int16 else (16, 2)
    row = torch.arange(rows)[:, None].expand(rows, cols)
    col = torch.arange(cols).expand(rows, cols)
    row = row // group * group + row % 8 * step + row % group // 8
    swap = (col % 2 - row % 2).sign()  # 1 above the diagonal of a square, -1 below, 0 on it
    row, col = row + swap, col - swap
    return col // 2 * (2 * rows) + row * 2 + col % 2


def show_tile(packed: NM, rows: int = 4, cols: int = 8) -> str:
    """The upper left tile of a matrix: its weights, and the values and metadata stored for it."""
    _, width = matrix_shape(packed.shape)
    cols = min(cols, width) // packed.m * packed.m
    dense = packed.decode().reshape(-1, width)[:rows, :cols].float()
    kept = cols // packed.m * packed.n
    places = packed.indices()[:rows, :kept] % packed.m
    lines = [f"{'weights':<{8 * cols}} | {'values':<{8 * kept}} | places"]
    for w, values, place in zip(dense, packed.values.float(), places, strict=False):
        weights = "".join(f"{v:8.2f}" if v else " " * 7 + "." for v in w.tolist())
        stored = "".join(f"{v:8.2f}" for v in values[:kept].tolist())
        marks = " ".join(f"{p:0{bits_for(packed.m)}b}" for p in place.tolist())
        lines.append(f"{weights} | {stored} | {marks}")
    return "\n".join(lines)
