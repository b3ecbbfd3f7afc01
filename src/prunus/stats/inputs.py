"""Statistics of a layer's inputs."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


class InputNorm:
    """Sum of squares of each input column, for the l2 norms ``||X_j||`` of Wanda and RIA."""

    reads: Literal["inputs", "gradients"] = "inputs"
    by_rows = False

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self.sum_of_squares = torch.zeros(columns, dtype=torch.float32, device=device)

    def update(self, inputs: Tensor) -> None:
        squares = inputs.float().square().sum(0)
        self.sum_of_squares += squares.to(self.sum_of_squares.device)

    def tensors(self) -> list[Tensor]:
        return [self.sum_of_squares]

    @property
    def nbytes(self) -> int:
        return self.sum_of_squares.nbytes

    @property
    def norm(self) -> Tensor:
        """(columns,) the l2 norm over all samples seen."""
        return self.sum_of_squares.sqrt()
