"""One bit for each weight says whether it is there; the values follow in order."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prunus.formats.base import Encoded, Mask, on_cpu, tensor, value_bits
from prunus.formats.bits import nonzero, raw


@dataclass(frozen=True, eq=False)
class Bitmask(Encoded):
    """1 + d * b bits a weight, at density d and b bits a value."""

    name = "bitmask"
    mask: Tensor
    """eight weights to a byte, the first in the highest bit"""
    values: Tensor

    @classmethod
    def encode(cls, t: Tensor) -> Bitmask:
        t = on_cpu(t)
        kept = nonzero(t).reshape(-1)
        values = raw(t).reshape(-1)[torch.from_numpy(kept)]
        return cls(tuple(t.shape), tensor(np.packbits(kept)), values.view(t.dtype))

    @staticmethod
    def size(mask: Mask, value_bits: int) -> int:
        return mask.size + int(mask.sum()) * value_bits

    def decode(self) -> Tensor:
        count = math.prod(self.shape)
        kept = np.unpackbits(self.mask.numpy(), count=count).view(np.bool_)
        if self.mask.numel() != -(-count // 8) or self.values.numel() != kept.sum():
            raise ValueError(f"{self.values.numel()} values for {kept.sum()} of {count} bits")
        result = torch.zeros(count, dtype=self.values.dtype)
        raw(result)[torch.from_numpy(kept)] = raw(self.values)
        return result.reshape(self.shape)

    def parts(self) -> dict[str, int]:
        values = self.values.numel() * value_bits(self.values)
        return {"indices": math.prod(self.shape), "values": values}
