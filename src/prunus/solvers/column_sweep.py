"""Pruning column by column, each column's error passed on to the columns after it.

E. Frantar and D. Alistarh, "SparseGPT: massive language models can be accurately pruned in
one-shot", 2023, https://arxiv.org/abs/2301.00774, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prunus.solvers.cholesky import cholesky, invert_lower
from prunus.solvers.column_sweep_numpy import Groups, sweep_groups

PANEL = 32  # columns solved at once
STRIPE = 128  # columns after which the rest of the matrix learns of the errors (the paper's B)

Choose = Callable[[Tensor, int, int], Tensor]


def upper_factor(h: Tensor) -> Tensor:
    """The upper triangular U with ``U^T U = H^-1``, from one factorization.

    With J the reversal of rows and columns and ``L L^T = J H J``, it is ``J L^-1 J``. Takes the
    memory of two more matrices on the way, where the caller does not keep `h`.
    """
    h = h.flip(0, 1)
    lower = cholesky(h.unsqueeze(0))
    del h
    return invert_lower(lower)[0].flip(0, 1)


def errors_by_columns(wt: Tensor, u: Tensor, drop: Tensor, errors: Tensor) -> None:
    """Sweep over k columns one after the other; `wt` is updated, `errors` filled.

    ``wt``, ``drop`` and ``errors`` are (k, rows): columns lie in memory one after the other. The
    error of column j is ``e_j = (w_j - q_j) / u_jj``, and ``w_i -= u_ji e_j`` for i >= j.
    """
    scale = drop.to(wt.dtype).div_(u.diagonal().unsqueeze(1))
    for j in range(len(wt)):
        error = torch.mul(wt[j], scale[j], out=errors[j])
        wt[j + 1 :].addr_(u[j, j + 1 :], error, alpha=-1)


def errors_by_solving(wt: Tensor, u: Tensor, drop: Tensor, errors: Tensor) -> None:
    """The same in one step, for devices on which many small ones take long.

    With the mask known, the recursion is one triangular system for each row, ``E M = w * drop``, in
    which column j of M is that of U where the row drops j and of the identity where it keeps it.
    """
    eye = torch.eye(len(u), dtype=u.dtype, device=u.device)
    system = torch.where(drop.T.unsqueeze(1), u, eye)  # (rows, k, k)
    rhs = torch.where(drop, wt, 0).T.unsqueeze(1)
    solved = torch.linalg.solve_triangular(system, rhs, upper=True, left=False)
    errors.copy_(solved.squeeze(1).T)
    wt.addmm_(u.T, errors, alpha=-1)


def sweep_columns(
    w: Tensor, u: Tensor, choose: Choose, every: int = STRIPE
) -> tuple[Tensor, Tensor]:
    """New weights and keep-mask. ``w`` is (rows, cols), ``u`` from `upper_factor`, of one dtype.

    ``choose(scores, begin, end)`` gives the (rows, end - begin) keep-mask of each `every` columns
    from the scores ``w^2 / u_jj^2`` of the weights as they are by then.
    """
    swept = _Sweep(w, u, choose, every)
    for begin in range(0, w.shape[1], swept.widths[0]):
        swept.solve(begin, min(begin + swept.widths[0], w.shape[1]))
    return swept.wt.masked_fill_(swept.drop, 0).T, ~swept.drop.T


class _Sweep:
    """Columns are solved in panels, and panels in stripes: each learns of the errors before it in
    one product, while it is in the cache."""

    def __init__(self, w: Tensor, u: Tensor, choose: Choose, every: int) -> None:
        self.wt, self.u = w.T.clone(memory_format=torch.contiguous_format), u
        self.choose, self.every = choose, every
        on_cpu = self.wt.device.type == "cpu"
        small = on_cpu and every <= PANEL
        self.groups = choose if small and isinstance(choose, Groups) else None
        self.scale = u.diagonal().square().reciprocal().unsqueeze(1)
        self.drop = torch.zeros_like(self.wt, dtype=torch.bool)
        panel = max(1, PANEL // every) * every if every < PANEL else PANEL
        stripe = max(1, STRIPE // max(panel, every)) * max(panel, every)
        self.widths = sorted({stripe, panel} if self.groups else {stripe, panel, every})[::-1]
        self.leaf = errors_by_columns if on_cpu else errors_by_solving
        self.errors = self.wt.new_empty(stripe, self.wt.shape[1])

    def solve(self, begin: int, end: int) -> None:
        """The columns of a stripe, and what all columns after it learn from them."""
        errors = self.errors[: end - begin]
        self._solve(begin, end, errors, 1)
        self._pass_on(begin, end, len(self.wt), errors)

    def _solve(self, begin: int, end: int, errors: Tensor, level: int) -> None:
        if self.widths[level - 1] == self.every and not self.groups:
            self._choose(begin, end)
        if level == len(self.widths):
            u, here = self.u[begin:end, begin:end], (self.wt[begin:end], self.drop[begin:end])
            if self.groups:
                sweep_groups(here[0], u, here[1], errors, self.groups, begin)
            else:
                self.leaf(here[0], u, here[1], errors)
            return
        for low in range(begin, end, self.widths[level]):
            high = min(low + self.widths[level], end)
            part = errors[low - begin : high - begin]
            self._solve(low, high, part, level + 1)
            self._pass_on(low, high, end, part)

    def _choose(self, begin: int, end: int) -> None:
        scores = self.wt[begin:end].square().mul_(self.scale[begin:end])
        torch.logical_not(self.choose(scores.T, begin, end).T, out=self.drop[begin:end])

    def _pass_on(self, begin: int, end: int, last: int, errors: Tensor) -> None:
        if end < last:
            self.wt[end:last].addmm_(self.u[begin:end, end:last].T, errors, alpha=-1)
