"""Gram matrices by halves: ``X^T X`` is symmetric, so one triangle says it all."""

from __future__ import annotations

from torch import Tensor

LEAF = 256  # columns whose square on the diagonal is computed whole
SMALLEST = 3 * LEAF  # columns from which the triangle takes clearly less time than the whole


def add_gram(total: Tensor, x: Tensor) -> bool:
    """Add ``x^T x`` to ``total`` (columns, columns), in place; ``x`` is (samples, columns).

    Returns whether all of it was added. On the CPU it is only what is above the diagonal, and in
    squares along it, if there are many columns: `mirror` has to follow before `total` is read.
    """
    if x.shape[1] < SMALLEST or x.device.type != "cpu":
        total.addmm_(x.T, x)
        return True
    _add(total, x)
    return False


def _add(total: Tensor, x: Tensor) -> None:
    # by halves, so that most of the work is in products of large squares
    columns = x.shape[1]
    if columns <= LEAF:
        total.addmm_(x.T, x)
        return
    half = columns // 2
    total[:half, half:].addmm_(x[:, :half].T, x[:, half:])
    _add(total[:half, :half], x[:, :half])
    _add(total[half:, half:], x[:, half:])


def mirror(total: Tensor) -> None:
    """Copy what `add_gram` left above the diagonal below it, in place."""
    if len(total) <= LEAF:
        return
    half = len(total) // 2
    total[half:, :half].copy_(total[:half, half:].T)
    mirror(total[:half, :half])
    mirror(total[half:, half:])
