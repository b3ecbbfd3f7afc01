"""Every value, zeros too: what the other formats are measured against."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from prunus.formats.base import Encoded, Mask, on_cpu, value_bits


@dataclass(frozen=True, eq=False)
class Dense(Encoded):
    """The tensor as it is."""

    name = "dense"
    values: Tensor

    @classmethod
    def encode(cls, t: Tensor) -> Dense:
        return cls(tuple(t.shape), on_cpu(t))

    @staticmethod
    def size(mask: Mask, value_bits: int) -> int:
        """Bits of a (rows, columns) matrix with values where `mask` is set."""
        return mask.size * value_bits

    def decode(self) -> Tensor:
        return self.values.clone()

    def parts(self) -> dict[str, int]:
        return {"values": math.prod(self.shape) * value_bits(self.values)}
