"""Some blocks of a Fisher matrix, however they are stored, and what is computed of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from prunus.solvers.cholesky import dual_inverse, inverse, resolvable_damp
from prunus.solvers.least_squares import power_of_two

SAFE = 2.0**40
"""gradients between its inverse and itself have squares that single precision holds in sums"""
NARROWEST, WIDEST = 1e-20, 1e30
"""largest scores of a block between which single precision holds the others, too"""
FIRST_JITTER = 1e-9  # of the mean diagonal, so that sums of few gradients have a factor


@dataclass(frozen=True)
class FisherBlocks:
    """Some of the blocks of a `BlockFisher`: sums (n, d, d), or samples or factors (n, m, d).

    ``unit`` is (n,), by which the gradients were divided before they were squared.
    """

    data: Tensor
    count: int
    damp: float
    dual: bool
    """whether ``data`` is G of ``G^T G``, not the product"""
    unit: Tensor | None = None

    def _in_double(self) -> Tensor:
        data = self.data.double()
        if self.unit is None:
            return data
        unit = self.unit.to(data).view(-1, 1, 1)
        return data * (unit if self.dual else unit.square())

    def fisher(self) -> Tensor:
        """(n, d, d) ``damp I + 1/m sum g g^T`` in float64."""
        data = self._in_double()
        f = data.mT @ data if self.dual else data.clone()
        f.div_(max(1, self.count)).diagonal(dim1=1, dim2=2).add_(self.damp)
        return f

    def inverse(self) -> Tensor:
        """(n, d, d) the inverse of `fisher`, in float64. Raises ValueError if there is none."""
        if self.dual and self.data.shape[1] < self.data.shape[2]:
            return dual_inverse(self._in_double(), self.damp)
        fisher = self.fisher()
        if self.count < fisher.shape[1]:
            mean = fisher.diagonal(dim1=1, dim2=2).mean(1) - self.damp
            more = resolvable_damp(self.damp, mean) - self.damp
            fisher.diagonal(dim1=1, dim2=2).add_(more.unsqueeze(1))
        return inverse(fisher)


def unit_for(peaks: Tensor) -> Tensor:
    """What gradients of these largest sizes are divided by before they are squared.

    A power of two, so that dividing rounds nothing; 1 where their squares are safe as they are.
    """
    safe = (peaks == 0) | ((peaks > 1 / SAFE) & (peaks < SAFE))
    return torch.where(safe, 1, power_of_two(peaks))


def add_to_factors(factors: Tensor, g: Tensor) -> None:
    """Make (n, d, d) factors R into those of ``R^T R + g^T g`` for (n, m, d) more gradients.

    Whatever they are rounded to, the product is positive semidefinite, and its small eigenvalues
    are off by the square of what those of a rounded product are off by.
    """
    old, g = factors.double(), g.double()
    total = torch.baddbmm(g.mT @ g, old.mT, old)
    diagonal = total.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    diagonal.add_(torch.where(mean > 0, FIRST_JITTER * mean, 1))
    upper = torch.linalg.cholesky(total).mT
    factors.copy_(torch.where(mean.unsqueeze(2) > 0, upper, 0))


def needs_double(values: Tensor) -> bool:
    """Whether single precision would hold zeros or infinities in place of numbers."""
    peak = float(values.abs().amax()) if values.numel() else 0.0
    return 0 < peak < NARROWEST or WIDEST < peak < math.inf
