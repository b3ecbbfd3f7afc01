"""EIE's format: a 4-bit code and a 4-bit relative index for each value, 16 shared values a layer.

Song Han et al., "EIE: Efficient Inference Engine on Compressed Deep Neural Network", ISCA 2016,
https://arxiv.org/abs/1602.01528, section III. The order of entries is that of `lanes`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prunus.formats.base import Encoded, Mask, as_matrix, matrix_shape, tensor, value_bits
from prunus.formats.bits import nonzero, pack_bits, raw, unpack_bits
from prunus.formats.lanes import Reset, Walk, entry_counts, virtual_zero_columns

SHORT_POINTER, LONG_POINTER = 16, 32


@dataclass(frozen=True, eq=False)
class EIE(Encoded):
    """(d + padding) * (code + index bits) bits a weight, pointers, and a codebook.

    Pointers take 16 bits, and 32 where a lane has more entries than those can count.
    """

    name = "eie"
    elements: int
    """processing elements that the rows are dealt out to"""
    code_bits: int
    index_bits: int
    reset: Reset
    count: int
    """entries of all elements, virtual zeros included"""
    pointers: Tensor
    """(elements, columns + 1) where each column begins in its element's entries"""
    codes: Tensor
    """packed; 0 is a virtual zero"""
    zeros: Tensor
    """zeros before each entry, packed"""
    codebook: Tensor
    """(2^code_bits,) of which the first is 0"""

    @classmethod
    def encode(
        cls,
        t: Tensor,
        elements: int = 64,
        *,
        code_bits: int = 4,
        index_bits: int = 4,
        reset: Reset = "column",
    ) -> EIE:
        """Encode a matrix whose values are already shared.

        Raises ValueError if it has more different values than codes.
        """
        matrix = as_matrix(t)
        walk = Walk.of(nonzero(matrix), elements)
        values = raw(matrix).reshape(-1)[torch.from_numpy(walk.flat)].numpy()
        shared = np.unique(values)
        if len(shared) >= 1 << code_bits:
            raise ValueError(
                f"{len(shared)} different values do not fit {code_bits}-bit codes; share weights "
                f"first, at most {(1 << code_bits) - 1} values beside zero"
            )
        codes = np.searchsorted(shared, values) + 1
        codebook = torch.zeros(1 << code_bits, dtype=t.dtype)
        raw(codebook)[1 : len(shared) + 1] = torch.from_numpy(shared)
        stored, zeros, counts = _entries(walk, codes, index_bits, reset)
        pointers = np.zeros((elements, counts.shape[1] + 1), np.int64)
        np.cumsum(counts, axis=1, out=pointers[:, 1:])
        kind = np.uint16 if pointers.max(initial=0) < 1 << SHORT_POINTER else np.int32
        return cls(
            tuple(t.shape), elements, code_bits, index_bits, reset, len(stored),
            tensor(pointers.astype(kind)), tensor(pack_bits(stored, code_bits)),
            tensor(pack_bits(zeros, index_bits)), codebook,
        )  # fmt: skip

    @staticmethod
    def size(
        mask: Mask,
        value_bits: int,
        elements: int = 64,
        *,
        code_bits: int = 4,
        index_bits: int = 4,
        reset: Reset = "column",
    ) -> int:
        counts = entry_counts(mask, elements, index_bits, reset)
        most = counts.sum(1).max(initial=0)
        pointer = SHORT_POINTER if most < 1 << SHORT_POINTER else LONG_POINTER
        entries = int(counts.sum()) * (code_bits + index_bits)
        pointers = pointer * elements * (int(mask.shape[1]) + 1)
        return entries + pointers + (value_bits << code_bits)

    def entries(self) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.integer]]:
        """Codes, and zeros before them, of all elements one after the other."""
        codes = unpack_bits(self.codes.numpy(), self.count, self.code_bits)
        return codes, unpack_bits(self.zeros.numpy(), self.count, self.index_bits)

    def decode(self) -> Tensor:
        rows, cols = matrix_shape(self.shape)
        codes, zeros = self.entries()
        lane, column, row = self._places(zeros.astype(np.int64))
        real = codes != 0
        flat = ((row * self.elements + lane) * cols + column)[real]
        result = torch.zeros(rows * cols, dtype=self.codebook.dtype)
        shared = raw(self.codebook)[torch.from_numpy(codes[real].astype(np.int64))]
        raw(result)[torch.from_numpy(flat)] = shared
        return result.reshape(self.shape)

    def _places(self, zeros: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], ...]:
        """Element, column and row in the element of each entry."""
        rows, cols = matrix_shape(self.shape)
        pointers = self.pointers.numpy().astype(np.int64)
        counts = pointers[:, 1:] - pointers[:, :-1]
        lane = np.repeat(np.arange(self.elements), counts.sum(1))
        steps = np.cumsum(zeros + 1)
        if self.reset == "column":
            groups = np.repeat(np.arange(counts.size), counts.reshape(-1))
        else:
            groups = lane
        first = np.flatnonzero(np.diff(groups, prepend=-1))
        before = np.concatenate([[0], steps])[first]
        each: npt.NDArray[np.int64] = np.append(first, len(groups))[1:] - first
        place = steps - np.repeat(before, each) - 1
        if self.reset == "column":
            return lane, groups % max(1, cols), place
        depth = Walk(self.elements, rows, cols, place, place).depths()[lane]
        column, row = np.divmod(place, depth)
        return lane, column, row

    def parts(self) -> dict[str, int]:
        return {
            "pointers": self.pointers.numel() * 8 * self.pointers.dtype.itemsize,
            "indices": self.count * self.index_bits,
            "values": self.count * self.code_bits,
            "codebook": self.codebook.numel() * value_bits(self.codebook),
        }


def _entries(
    walk: Walk, codes: npt.NDArray[np.integer], index_bits: int, reset: Reset
) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.integer], npt.NDArray[np.int64]]:
    """Codes and zeros of all entries, and (lanes, columns) how many there are."""
    gaps = walk.zeros_before(reset)
    padding = gaps >> index_bits
    last = np.cumsum(padding + 1) - 1  # a value comes after the virtual zeros before it
    stored = np.zeros(len(gaps) + int(padding.sum()), np.uint8)
    zeros = np.full(len(stored), (1 << index_bits) - 1, np.uint8)
    stored[last] = codes
    zeros[last] = gaps & ((1 << index_bits) - 1)
    counts = np.bincount(walk.lane_columns, minlength=walk.lanes * walk.columns)
    owners = virtual_zero_columns(walk, padding, index_bits, reset)
    counts += np.bincount(owners, minlength=len(counts))
    return stored, zeros, counts.reshape(walk.lanes, walk.columns)
