"""What every storage format has: an encoder, a decoder and a size that is exact to the bit."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Mask = npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded(abc.ABC):
    """A tensor as a format stores it. Fields that are tensors are what memory holds."""

    name: ClassVar[str]
    shape: tuple[int, ...]

    @classmethod
    @abc.abstractmethod
    def encode(cls, t: Tensor) -> Encoded:
        """Encode a tensor; its first dimension is rows, all others are columns.

        Minus zero comes back as zero. Raises ValueError where the format cannot hold the tensor.
        """

    @abc.abstractmethod
    def decode(self) -> Tensor:
        """The dense tensor, on the CPU."""

    @abc.abstractmethod
    def parts(self) -> dict[str, int]:
        """Bits by what they hold: ``values``, ``indices``, ``pointers``, ``codebook``."""

    @property
    def bits(self) -> int:
        """Bits of storage, exactly; a field of the last byte may be left over in `nbytes`."""
        return sum(self.parts().values())

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are really held."""
        return sum(t.nbytes for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Field name -> tensor, for writing to a file."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if isinstance(value, Tensor)}

    def options(self) -> dict[str, Any]:
        """The other fields, which JSON can hold."""
        names = [f.name for f in dataclasses.fields(self)]
        return {name: getattr(self, name) for name in names if name not in self.tensors()}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], options: Mapping[str, Any]) -> Encoded:
        """What `tensors` and `options` came from, as read back from a file."""
        fields: dict[str, Any] = {**options, **tensors}
        return cls(**{**fields, "shape": tuple(fields["shape"])})


def on_cpu(t: Tensor) -> Tensor:
    return t.detach().cpu().contiguous()


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns): the first dimension, and all others together."""
    rows = shape[0] if shape else 1
    return rows, math.prod(shape[1:])


def as_matrix(t: Tensor) -> Tensor:
    return on_cpu(t).reshape(matrix_shape(tuple(t.shape)))


def value_bits(t: Tensor) -> int:
    return 8 * t.dtype.itemsize


def counts_to_pointers(counts: npt.NDArray[Any], dtype: Any = np.int32) -> npt.NDArray[Any]:
    """Entries of each row -> where each row begins and the last one ends."""
    pointers = np.zeros(len(counts) + 1, dtype)
    np.cumsum(counts, out=pointers[1:])
    return pointers


def tensor(array: npt.NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
