"""A few columns of an N:M sweep on a CPU, in numpy.

A group is some thirty operations on a few thousand numbers each, and there are hundreds of groups
one after the other; starting an operation of torch takes longer than doing it, of numpy a third.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunus.solvers.selection import keep_highest_of_groups, largest

Array = Any  # numpy.ndarray of single or double precision


@dataclass(frozen=True)
class Groups:
    """Keeps the n highest of every m columns.

    ``alive`` is (rows, cols): what was pruned before stays so; ``useless`` (cols,) go first.
    """

    n: int
    m: int
    alive: Tensor
    useless: Tensor

    def __call__(self, scores: Tensor, begin: int, end: int) -> Tensor:
        here = self.alive[:, begin:end]
        scores = scores.masked_fill(self.useless[begin:end], 0).masked_fill(~here, -1)
        return keep_highest_of_groups(scores, self.n, self.m) & here

    def first_to_go(self, begin: int, end: int) -> tuple[Array | None, Array | None]:
        """(k, 1) useless columns and (k, rows) dead weights among k columns; None where none is."""
        dead, useless = ~self.alive[:, begin:end].T, self.useless[begin:end].unsqueeze(1)
        return _if_any(useless), _if_any(dead)


def _if_any(mask: Tensor) -> Array | None:
    return mask.numpy() if bool(mask.any()) else None


def sweep_groups(
    wt: Tensor, u: Tensor, drop: Tensor, errors: Tensor, groups: Groups, first: int
) -> None:
    """Choose and sweep k columns from the `first` on, group by group; all but `u` are updated.

    ``wt``, ``drop`` and ``errors`` are (k, rows), columns one after the other in memory, ``u`` is
    (k, k). The error of column j is ``e_j = (w_j - q_j) / u_jj``, and ``w_i -= u_ji e_j``.
    """
    w, factor, gone, e = wt.numpy(), u.numpy(), drop.numpy(), errors.numpy()
    n, m = groups.n, groups.m
    useless, dead = groups.first_to_go(first, first + len(w))
    inverse = (1 / u.diagonal()).unsqueeze(1).numpy()
    scale, room = inverse * inverse, np.empty_like(w[:m])
    for begin in range(0, len(w), m):
        at = slice(begin, begin + m)
        np.multiply(w[at], w[at], out=room)
        np.multiply(room, scale[at], out=room)
        if useless is not None:
            np.copyto(room, 0, where=useless[at])
        if dead is not None:
            np.copyto(room, -1, where=dead[at])
        _drop_lowest(room, n, gone[at])
        if dead is not None:
            np.logical_or(gone[at], dead[at], out=gone[at])
        np.multiply(gone[at], inverse[at], out=room)
        _errors(w[at], factor[at, at], room, e[at])
        if begin + m < len(w):
            w[begin + m :] -= factor[at, begin + m :].T @ e[at]


def _drop_lowest(scores: Array, n: int, out: Array) -> None:
    """(m, rows) which of m entries are not among the n highest; of equal ones the first go."""
    np.less(scores, largest(scores, n, np.maximum, np.minimum)[-1], out=out)
    m, rows = scores.shape
    if np.count_nonzero(out) != (m - n) * rows:  # some are equal
        out[:] = ~keep_highest_of_groups(torch.from_numpy(scores.T.copy()), n, m).T.numpy()


def _errors(w: Array, u: Array, scale: Array, errors: Array) -> None:
    """The errors of one group, which its later columns make up for; ``scale`` is 0 where kept."""
    room = np.empty_like(w[0])
    for j in range(len(w)):
        np.multiply(w[j], scale[j], out=errors[j])
        for i in range(j + 1, len(w)):
            np.multiply(errors[j], u[j, i], out=room)
            np.subtract(w[i], room, out=w[i])
