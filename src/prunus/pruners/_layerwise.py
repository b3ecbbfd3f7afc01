"""What the methods that look at one layer's inputs have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunus.core.layers import Layer, working_precision
from prunus.core.patterns import NM, Block, Pattern
from prunus.pruners.base import ScorePruner
from prunus.solvers.least_squares import refit, ridge_of, with_ridge
from prunus.solvers.mask_swaps import swap
from prunus.stats import InputGram, InputNorm

SWAPS = 100  # in a row, at most
PASSES = 10  # over the groups of a row, at most; later ones gain little
InputStatistic = InputNorm | InputGram


def gram_of(layer: Layer, device: str | None) -> InputGram:
    """An empty Gram matrix of a layer's inputs."""
    return InputGram(layer.matrix_shape()[1], device, dtype_of(layer))


def dtype_of(layer: Layer) -> torch.dtype:
    """In which statistics of a layer are summed."""
    return torch.float64 if layer.weight.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Layerwise(ScorePruner):
    """Settings of methods that score weights by a layer's inputs, and what may follow the scores.

    Both options look at the layer's output error ``||(w_new - w) X||``, by way of ``X^T X``.
    """

    swap: bool = False
    """exchange a kept weight for a dropped one of the same row (N:M: group) while that lowers the
    error; needs the Gram matrix of the inputs"""
    refit: bool = False
    """solve for the weights that stay, by conjugate gradients; needs the Gram matrix too"""
    device: str | None = None
    """where a Gram matrix is stored; default: where the inputs are"""

    def check(self, cols: int, pattern: Pattern) -> None:
        """Raises ValueError if the options do not go with the pattern."""
        if self.swap and isinstance(pattern, Block):
            raise ValueError(f"swap exchanges single weights, not blocks of '{pattern}'; drop swap")

    def statistic(self, layer: Layer) -> InputStatistic | None:
        if self.swap or self.refit:
            return gram_of(layer, self.device)
        return InputNorm(layer.matrix_shape()[1], dtype=dtype_of(layer))

    def refine(self, w: Tensor, stat: Any, mask: Tensor, pattern: Pattern) -> Tensor:
        """A keep-mask with as many weights in each row (N:M: group), and no larger an error.

        In the error counts the ridge that `refit` has: with few inputs the swaps that gain most on
        them lose on others.
        """
        if not self.swap:
            return mask
        dense = working_precision(w)
        gram = stat.gram(w.device).to(dense.dtype)
        gram = with_ridge(gram, ridge_of(stat.count, len(gram)))
        if isinstance(pattern, NM):
            return swap(dense, gram, mask, PASSES, pattern.m)
        return swap(dense, gram, mask, SWAPS)

    def rebuild(self, w: Tensor, stat: Any, mask: Tensor) -> Tensor:
        if not self.refit:
            return w
        dense = working_precision(w)
        gram = stat.gram(w.device).to(dense.dtype)
        start = torch.where(mask, dense, 0)
        return refit(dense, start, gram, mask, ridge=ridge_of(stat.count, len(gram)))
