"""Where the matrices of layers lie in memory, and what is a view or a copy of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prunus.core.layers import Layer


class Place(NamedTuple):
    """Where the matrix of a layer lies in a memory, in elements."""

    layer: Layer
    offset: int
    rows: int
    columns: int
    row_stride: int
    column_stride: int

    @classmethod
    def of(cls, layer: Layer) -> Place:
        m = layer.matrix(layer.local)
        return cls(layer, int(m.storage_offset()), *m.shape, *m.stride())

    def is_in(self, offset: int, shape: Sequence[int], strides: Sequence[int]) -> bool | None:
        """Whether a (columns, outputs) view has all rows of the layer; None if only some."""
        (k, n), (k_stride, n_stride) = shape, strides
        if k != self.columns or (k > 1 and k_stride != self.column_stride):
            return False
        if (n > 1 and self.rows > 1 and n_stride != self.row_stride) or not n_stride:
            return n == 1 == self.rows and offset == self.offset
        stride = n_stride if n > 1 else self.row_stride
        first, rest = divmod(self.offset - offset, stride)
        if rest or first >= n or first + self.rows <= 0:
            return False
        return True if first >= 0 and first + self.rows <= n else None


class Copy(NamedTuple):
    """A tensor that was copied from a weight, entry by entry."""

    made: Tensor
    pointer: int
    """the memory of the weight"""
    begin: int
    strides: tuple[int, ...]
    """of what was copied, in the weight's memory"""

    @property
    def laid_out_alike(self) -> bool:
        return self.made.stride() == self.strides

    def origins(self, view: Tensor, axis: int) -> Tensor:
        """From where in the weight's memory the entries along the first of an axis are."""
        at = torch.arange(view.shape[axis]) * view.stride(axis)
        at += int(view.storage_offset() - self.made.storage_offset())
        origin = torch.full_like(at, self.begin)
        for size, stride, source in zip(
            self.made.shape, self.made.stride(), self.strides, strict=True
        ):
            if size > 1:
                origin += at // stride % size * source
        return origin


def is_order(numbers: Tensor, count: int) -> bool:
    return torch.equal(numbers.sort().values, torch.arange(count))
