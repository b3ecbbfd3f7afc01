"""How the matrix of a layer lies in a parameter that holds several of them, or has other axes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Kind = Literal["third", "expert", "group", "flat"]


@dataclass(frozen=True)
class Piece:
    """One of ``count`` matrices in a parameter: a view of it.

    A ``third`` is q, k or v in a fused weight and a ``group`` that of a convolution, both cut along
    `dim`; an ``expert`` is one of the entries along the first axis, and ``flat`` is the whole with
    all axes but the first joined.
    """

    kind: Kind
    number: int = 0
    count: int = 1
    dim: int = 0

    @property
    def key(self) -> int | None:
        """What tells it from the others of its parameter; None if it is the whole."""
        return None if self.kind == "flat" else self.number

    def of(self, t: Tensor) -> Tensor:
        """Its part of a tensor of the parameter's (local) shape; a view of a contiguous one."""
        if self.kind == "flat":
            return t.flatten(1)
        if self.kind == "expert":
            return t.select(0, self.number)
        size = t.shape[self.dim] // self.count
        return t.narrow(self.dim, self.number * size, size)

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of its part, where the parameter has this shape."""
        if self.kind == "flat":
            rest = 1
            for size in shape[1:]:
                rest *= size
            return (shape[0], rest)
        if self.kind == "expert":
            return shape[1:]
        return tuple(n // self.count if i == self.dim else n for i, n in enumerate(shape))
