"""Forms of a weight that run without its zeros: compressed rows and blocks, on CPUs.

A form holds a (outputs, inputs) matrix. Speed is not promised: a compressed matrix wins over a
dense one from some sparsity on, which depends on the machine, the shape and the number of rows.
"""

from __future__ import annotations

import abc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prunus.execution.inference.zeros import kept_blocks

SIDES = (4, 8, 16, 32)
MOST = 2**31 - 1  # entries that int32 can count


@contextmanager
def as_stable() -> Iterator[None]:
    """Without torch's warnings that its sparse tensors are a beta or a prototype."""
    with warnings.catch_warnings():
        for message in ("Sparse (CSR|BSR|Compressed)", "The PyTorch API of SparseSemiStructured"):
            warnings.filterwarnings("ignore", message=message)
        yield


class Form(abc.ABC):
    """A (outputs, inputs) matrix in a form that multiplies."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    @abc.abstractmethod
    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x @ w.T + bias`` of (rows, inputs), contiguous."""

    @abc.abstractmethod
    def dense(self) -> Tensor:
        """The matrix, in new memory."""

    @property
    @abc.abstractmethod
    def nbytes(self) -> int:
        """Bytes that it takes."""


class Spec(NamedTuple):
    """How a matrix is brought into a form."""

    name: str
    build: Callable[[Tensor], Form]


class Compressed(Form):
    """CSR, or BSR where ``values`` are (blocks, side, side). Indices are int32: MKL takes those as
    they are and torch copies any others for each product; and they are half the memory."""

    def __init__(self, parts: tuple[Tensor, Tensor, Tensor], shape: tuple[int, int]) -> None:
        self.parts, self.shape = parts, shape
        self.dtype, self.device = parts[2].dtype, parts[2].device
        layout = torch.sparse_csr if parts[2].dim() == 1 else torch.sparse_bsr
        with as_stable():
            self._matrix = torch.sparse_compressed_tensor(
                *parts, shape, layout=layout, check_invariants=False
            )

    @classmethod
    def of(cls, matrix: Tensor, side: int = 1) -> Compressed:
        with as_stable():
            made = matrix.to_sparse_csr() if side == 1 else matrix.to_sparse_bsr((side, side))
        indices = made.crow_indices().int(), made.col_indices().int()
        return cls((*indices, made.values()), (matrix.shape[0], matrix.shape[1]))

    def __reduce__(self) -> tuple[Any, ...]:
        return Compressed, (self.parts, self.shape)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if len(x) == 1 and self.parts[2].dim() == 1:  # twice as fast as a matrix of one column
            y = torch.mv(self._matrix, x[0])
            return (y if bias is None else y + bias).unsqueeze(0)
        columns = x.t().contiguous()
        if bias is None:
            return torch.mm(self._matrix, columns).t().contiguous()
        return torch.addmm(bias.unsqueeze(1), self._matrix, columns).t().contiguous()

    def dense(self) -> Tensor:
        return self._matrix.to_dense()

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


def candidates(matrix: Tensor) -> tuple[list[Spec], dict[str, str]]:
    """The compressed forms worth measuring for a matrix, and why the others are not."""
    if message := _no_kernel(matrix):
        return [], {"csr": message, "bsr": message}
    specs, refused = [], {}
    size, density = matrix.element_size(), int(matrix.count_nonzero()) / max(1, matrix.numel())
    break_even = size / (size + 4)
    if density < break_even:
        specs.append(Spec("csr", Compressed.of))
    else:
        refused["csr"] = (
            f"sparsity {1 - density:.2f} is too low: up to {1 - break_even:.2f} the indices take "
            "what the zeros save"
        )
    full = min(0.9, 1.25 * density)
    sides = [side for side in SIDES if kept_blocks(matrix, side, side) < full]
    specs += [Spec(f"bsr {side}x{side}", partial(Compressed.of, side=side)) for side in sides]
    if not sides:
        refused["bsr"] = "its zeros form no square blocks of 4, 8, 16 or 32"
    return specs, refused


def _no_kernel(matrix: Tensor) -> str:
    if matrix.device.type != "cpu":
        return "for CPUs only"
    if not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return "this torch is built without MKL"
    if matrix.dtype not in (torch.float32, torch.float64):
        return f"for float32 and float64 only, and the weight is {str(matrix.dtype)[6:]}"
    return "" if matrix.numel() <= MOST else "more weights than int32 can count"
