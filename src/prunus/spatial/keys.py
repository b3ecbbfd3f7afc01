"""Coordinates as single integers, in whose order a shift of all sites is adding a constant.

PointAcc finds neighbours by merging a sorted cloud with its own shifted copy, without a hash table
(Lin et al., "PointAcc", MICRO 2021, https://arxiv.org/abs/2110.07600). On a grid with a margin of
empty sites around it, the key of a shifted site is the key plus the key of the shift, so that the
shifted copy stays sorted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_LARGEST = {torch.int32: 2**31 - 1, torch.int64: 2**63 - 1}


@dataclass(frozen=True)
class Grid:
    """Row-major keys of (batch, *place), with `margin` empty sites on each side of each axis."""

    shape: tuple[int, ...]
    margin: tuple[int, ...]

    @property
    def extents(self) -> tuple[int, ...]:
        """Sites of each axis, a margin before them and one, shared with the next line, after."""
        return tuple(s + 2 * m for s, m in zip(self.shape, self.margin, strict=True))

    def strides(self) -> tuple[int, ...]:
        """What one step along each axis adds to a key; the first is that of the batch."""
        extents = self.extents
        return tuple(math.prod(extents[i:]) for i in range(len(extents) + 1))

    def shift(self, offset: Sequence[int]) -> int:
        """The key of a shift, which may be negative."""
        return sum(o * s for o, s in zip(offset, self.strides()[1:], strict=True))

    def dtype(self, batch_size: int) -> torch.dtype:
        """The smallest type that holds all keys. Raises ValueError if none does."""
        most = batch_size * self.strides()[0] + abs(self.shift(self.margin))
        if most > _LARGEST[torch.int64]:
            raise ValueError(
                f"a grid of {self.shape} with {batch_size} examples has more sites than 64-bit "
                "keys; use coarser voxels"
            )
        return torch.int32 if most <= _LARGEST[torch.int32] else torch.int64

    def keys(self, indices: Tensor, batch_size: int) -> Tensor:
        """(N, 1 + D) places -> (N,) keys."""
        columns = indices.to(self.dtype(batch_size)).unbind(1)
        key = columns[0] * self.strides()[0] + self.shift(self.margin)
        for column, stride in zip(columns[1:], self.strides()[1:], strict=True):
            key += column * stride
        return key

    def places(self, keys: Tensor) -> Tensor:
        """(N,) keys -> (N, 1 + D) places, int32."""
        columns, rest = [], keys - self.shift(self.margin)
        for stride in self.strides():
            columns.append(rest.div(stride, rounding_mode="floor"))
            rest = rest - columns[-1] * stride
        return torch.stack(columns, 1).int()


def lower_bounds(sorted_keys: Tensor, queries: Tensor) -> Tensor:
    """Where each query is or would be, clamped to the last place."""
    found = torch.searchsorted(sorted_keys, queries)
    return found.clamp_(max=max(0, len(sorted_keys) - 1))
