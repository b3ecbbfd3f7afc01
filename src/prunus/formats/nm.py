"""N:M: of every M consecutive weights of a row N values, and the place of each in its group.

The place takes ceil(log2 M) bits: 2 for 2:4, which is NVIDIA's metadata (Mishra et al.,
"Accelerating Sparse Deep Neural Networks", https://arxiv.org/abs/2104.08378). `multiply` is what
a sparse tensor core does with it: each place drives a multiplexer that picks one of M inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prunus.formats.base import Encoded, Mask, as_matrix, matrix_shape, tensor, value_bits
from prunus.formats.bits import bits_for, nonzero, pack_bits, raw, unpack_bits

_TABLE_SIZE = 1 << 16


@dataclass(frozen=True, eq=False)
class NM(Encoded):
    """N / M * (b + ceil(log2 M)) bits a weight, whatever the values are."""

    name = "nm"
    n: int
    m: int
    values: Tensor
    """(rows, columns / M * N), groups in order, places ascending in each"""
    places: Tensor
    """the place of each value in its group, packed in ceil(log2 M) bits"""

    @classmethod
    def encode(cls, t: Tensor, n: int = 2, m: int = 4) -> NM:
        """Groups with fewer than N values are filled up with zeros of theirs.

        Raises ValueError where a group has more.
        """
        matrix = as_matrix(t)
        mask = nonzero(matrix)
        _check(mask, n, m)
        places = kept_places(mask.reshape(-1, m), n)
        groups = raw(matrix).reshape(-1, m)
        values = groups.gather(1, torch.from_numpy(places.astype(np.int64)))
        values = values.reshape(len(matrix), matrix.shape[1] // m * n).view(t.dtype)
        packed = tensor(pack_bits(places.reshape(-1), bits_for(m)))
        return cls(tuple(t.shape), n, m, values, packed)

    @staticmethod
    def size(mask: Mask, value_bits: int, n: int = 2, m: int = 4) -> int:
        _check(mask, n, m)
        return mask.size // m * n * (value_bits + bits_for(m))

    def indices(self) -> Tensor:
        """(rows, columns / M * N) the column of each value."""
        rows, cols = matrix_shape(self.shape)
        places = unpack_bits(self.places.numpy(), self.values.numel(), bits_for(self.m))
        groups = np.repeat(np.arange(0, cols, self.m), self.n)
        return tensor(places.reshape(rows, len(groups)) + groups)

    def decode(self) -> Tensor:
        rows, cols = matrix_shape(self.shape)
        result = torch.zeros(rows, cols, dtype=self.values.dtype)
        raw(result).scatter_(1, self.indices(), raw(self.values))
        return result.reshape(self.shape)

    def parts(self) -> dict[str, int]:
        count = self.values.numel()
        return {"indices": count * bits_for(self.m), "values": count * value_bits(self.values)}

    def multiply(self, x: Tensor) -> Tensor:
        """``x @ w.T`` from values and places alone, for x of (samples, columns): the reference.

        Each value meets the one input of its group that its place selects; no product with a
        weight that is not stored is formed.
        """
        selected = x[:, self.indices()]
        return torch.einsum("srk,rk->sr", selected, self.values.to(x.dtype))


def kept_places(groups: Mask, n: int) -> npt.NDArray[np.integer]:
    """(groups, M) which values there are -> (groups, N) ascending places of those to store.

    What is missing is filled up with later places first. Groups of 2:4 are filled up as core
    torch and CUTLASS do it, so that the metadata is the same to the bit.
    """
    m = groups.shape[1]
    if 1 << m <= _TABLE_SIZE:
        codes = groups @ (1 << np.arange(m))
        return _table(n, m)[codes]
    return _fill(groups, n)


def _fill(groups: Mask, n: int) -> npt.NDArray[np.integer]:
    first = np.argsort(~groups[:, ::-1], axis=1, kind="stable")[:, :n]
    return np.sort(groups.shape[1] - 1 - first, axis=1)


def _table(n: int, m: int) -> npt.NDArray[np.integer]:
    """The places for each of the 2^M masks, the first weight in the lowest bit."""
    masks = (np.arange(1 << m)[:, None] >> np.arange(m) & 1).astype(np.bool_)
    table = _fill(masks, n).astype(np.uint8)
    if (n, m) == (2, 4):
        table[[0b0000, 0b0001, 0b0010, 0b0100, 0b1000]] = (2, 3), (0, 2), (1, 2), (2, 3), (2, 3)
    return table


def _check(mask: Mask, n: int, m: int) -> None:
    cols = mask.shape[1]
    if not 0 < n <= m:
        raise ValueError(f"{n}:{m} keeps N of M values; 0 < N <= M is needed")
    if cols % m:
        raise ValueError(f"{n}:{m} does not divide {cols} columns; use an M that does")
    crowded = np.flatnonzero(mask.reshape(-1, m).sum(1) > n)
    if len(crowded):
        row, group = divmod(int(crowded[0]), cols // m)
        raise ValueError(
            f"no {n}:{m} matrix: row {row} has more than {n} values in columns {group * m} to "
            f"{group * m + m - 1}; prune it with pattern '{n}:{m}' first"
        )
