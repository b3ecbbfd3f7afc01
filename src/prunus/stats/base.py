"""What every statistic has in common."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Statistic(Protocol):
    """Something summed over calibration data for one layer.

    A sum, so that data-parallel ranks add up: `tensors` are what one all-reduce makes whole.
    """

    def update(self, inputs: Tensor) -> None:
        """Take in layer inputs as (samples, columns), columns as in the layer's matrix."""
        ...

    def tensors(self) -> list[Tensor]: ...

    @property
    def nbytes(self) -> int:
        """Bytes it holds, known before any data has been seen."""
        ...
