"""Statistics of a layer's inputs."""

from __future__ import annotations

import warnings
from typing import ClassVar

import torch
from torch import Tensor

from prunus.solvers.column_sweep import upper_factor
from prunus.solvers.gram import add_gram, mirror
from prunus.stats.base import Statistic, register_statistic

STEP = 1 << 25  # entries of the inputs that are made single precision at a time


def _single(inputs: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The inputs in working precision, some rows at a time where that needs a copy."""
    if inputs.dtype == dtype:
        return [inputs]
    rows = max(1, STEP // max(1, inputs.shape[1]))
    return [part.to(dtype) for part in torch.split(inputs, rows)]


@register_statistic
class InputNorm(Statistic):
    """Sum of squares of each input column, for the l2 norms ``||X_j||`` of Wanda and RIA.

    >>> stat = prunus.InputNorm(columns=2)
    >>> stat.update(torch.tensor([[3.0, 0.0], [4.0, 1.0]]))
    >>> stat.norm
    tensor([5., 1.])
    """

    name: ClassVar[str] = "input_norm"

    def __init__(
        self,
        columns: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.sum_of_squares = torch.zeros(columns, dtype=dtype, device=device)

    def update(self, inputs: Tensor) -> None:
        for part in _single(inputs, self.sum_of_squares.dtype):
            self.sum_of_squares += part.square().sum(0).to(self.sum_of_squares.device)

    def tensors(self) -> list[Tensor]:
        return [self.sum_of_squares]

    def permute(self, perm: Tensor) -> None:
        """Follow the layer's columns, of which the i-th is now what ``perm[i]`` was."""
        self.sum_of_squares = self.sum_of_squares[perm.to(self.sum_of_squares.device)]

    @property
    def nbytes(self) -> int:
        return self.sum_of_squares.nbytes

    @property
    def norm(self) -> Tensor:
        """(columns,) the l2 norm over all samples seen."""
        return self.sum_of_squares.sqrt()


@register_statistic
class InputGram(Statistic):
    """The Gram matrix ``X^T X`` of a layer's inputs, (columns, columns).

    Held where the first inputs were, unless a `device` is given; in float64 for layers that are.

    >>> stat = prunus.InputGram(columns=2)
    >>> stat.update(torch.tensor([[3.0, 0.0], [4.0, 1.0]]))
    >>> stat.gram("cpu")
    tensor([[25.,  4.],
            [ 4.,  1.]])
    """

    name: ClassVar[str] = "input_gram"

    def __init__(
        self, columns: int, device: str | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        self.columns, self.device, self.dtype = columns, device, dtype
        self._sum = torch.zeros(0)
        self._count = torch.zeros(1, dtype=torch.float64)
        self._factor: tuple[float, Tensor] | None = None
        self._whole = True  # whether what is below the diagonal is there as well

    def _begin(self, device: torch.device | str) -> None:
        if not self._sum.numel():
            place = device if self.device is None else self.device
            shape = self.columns, self.columns
            self._sum = torch.zeros(shape, dtype=self.dtype, device=place)

    def update(self, inputs: Tensor) -> None:
        self._begin(inputs.device)
        self._factor = None
        self._count += len(inputs)
        for part in _single(inputs, self.dtype):
            if self._sum.device == part.device:
                self._whole &= add_gram(self._sum, part)
            else:
                self._sum += (part.T @ part).to(self._sum.device)

    def tensors(self) -> list[Tensor]:
        self._begin("cpu")
        self._whole = False  # other ranks, whose sums are added, may have the upper half only
        return [self._sum, self._count]

    def _mirrored(self) -> Tensor:
        self._begin("cpu")
        if not self._whole:
            mirror(self._sum)
            self._whole = True
        return self._sum

    def permute(self, perm: Tensor) -> None:
        """Follow the layer's columns, of which the i-th is now what ``perm[i]`` was."""
        perm = perm.to(self._sum.device)
        self._sum, self._factor = self._mirrored()[perm][:, perm], None

    @property
    def nbytes(self) -> int:
        return int(self.dtype.itemsize * self.columns**2 + 8)

    @property
    def count(self) -> int:
        """Samples (tokens, or positions of a convolution) seen."""
        return int(self._count)

    def shortage(self) -> str:
        few = 0 < self.count < self.columns
        return f"{self.count} inputs for {self.columns} columns" if few else ""

    @property
    def norm(self) -> Tensor:
        """(columns,) the l2 norm over all samples seen."""
        self._begin("cpu")
        return self._sum.diagonal().clamp(min=0).sqrt()

    def gram(self, device: torch.device | str) -> Tensor:
        """(columns, columns) ``X^T X`` on this device; not a copy where it is there already."""
        return self._mirrored().to(device)

    def matrix(self, device: torch.device | str) -> Tensor:
        """`gram`, as version 0.1 called it."""
        warnings.warn("InputGram.matrix is now gram", FutureWarning, stacklevel=2)
        return self.gram(device)

    def factor(self, damp: float, device: torch.device | str) -> Tensor:
        """The upper factor of ``(2/n X^T X + damp * mean diagonal)^-1``, dead columns set to 1.

        Computed once for all layers that share these inputs.
        """
        if self._factor is None or self._factor[0] != damp or self._factor[1].device != device:
            self._factor = None  # frees the memory first
            gram = self.gram(device)
            diagonal = gram.diagonal().clone()
            scale = 2 / max(1, self.count)
            # columns without inputs, or with such that their squares are denormal
            dead = diagonal < torch.finfo(diagonal.dtype).tiny
            filled = torch.where(dead, 1 / scale, diagonal)
            mean = filled.mean()
            # a unit of its own, because inputs may be so small that their squares are denormal
            factor = upper_factor(gram.diagonal_scatter(filled + damp * mean).div_(mean))
            self._factor = (damp, factor.div_((mean * scale).sqrt()))
        return self._factor[1]

    def forget(self) -> None:
        """Free the factor, which is as large as the matrix."""
        self._factor = None
