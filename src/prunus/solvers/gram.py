"""Gram matrices by halves: ``X^T X`` is symmetric, so one triangle says it all."""

from __future__ import annotations

from torch import Tensor

BLOCK = 512  # columns at a time: wide enough for the product to run at full speed
SMALLEST = 4 * BLOCK  # columns from which the triangle takes less time than the whole


def add_gram(total: Tensor, x: Tensor) -> bool:
    """Add ``x^T x`` to ``total`` (columns, columns), in place; ``x`` is (samples, columns).

    Returns whether all of it was added; else only what is on the diagonal and above, and within
    blocks of `BLOCK` columns below, and `mirror` has to follow before `total` is read.
    """
    columns = x.shape[1]
    if columns < SMALLEST or x.device.type != "cpu":
        total.addmm_(x.T, x)
        return True
    for begin in range(0, columns, BLOCK):
        end = min(begin + BLOCK, columns)
        total[:end, begin:end].addmm_(x[:, :end].T, x[:, begin:end])
    return False


def mirror(total: Tensor) -> None:
    """Copy what is above the diagonal below it, in place."""
    for begin in range(0, len(total), BLOCK):
        end = begin + BLOCK
        total[end:, begin:end].copy_(total[begin:end, end:].T)
        corner = total[begin:end, begin:end]
        corner.copy_(corner.triu() + corner.triu(1).T)
