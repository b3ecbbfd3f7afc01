"""Pruning column by column, each column's error passed on to the columns after it.

E. Frantar and D. Alistarh, "SparseGPT: massive language models can be accurately pruned in
one-shot", 2023, https://arxiv.org/abs/2301.00774, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from prunus.linalg import cholesky

PANEL = 32  # columns solved at once
STRIPE = 128  # columns after which the rest of the matrix learns of the errors (the paper's B)

Choose = Callable[[Tensor, int, int], Tensor]


def upper_factor(h: Tensor) -> Tensor:
    """The upper triangular U with ``U^T U = H^-1``, from one factorization.

    With J the reversal of rows and columns and ``L L^T = J H J``, it is ``J L^-1 J``.
    """
    flipped = cholesky(h.flip(0, 1).unsqueeze(0))[0]
    eye = torch.eye(len(h), dtype=h.dtype, device=h.device)
    inverse: Tensor = torch.linalg.solve_triangular(flipped, eye, upper=False)
    return inverse.flip(0, 1)


def errors_by_columns(wt: Tensor, u: Tensor, drop: Tensor, errors: Tensor) -> None:
    """Sweep over k columns one after the other; `wt` is updated, `errors` filled.

    ``wt``, ``drop`` and ``errors`` are (k, rows): columns lie in memory one after the other. The
    error of column j is ``e_j = (w_j - q_j) / u_jj``, and ``w_i -= u_ji e_j`` for i >= j.
    """
    scale = torch.where(drop, 1 / u.diagonal().unsqueeze(1), 0)
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


def sweep(w: Tensor, u: Tensor, choose: Choose, every: int = STRIPE) -> tuple[Tensor, Tensor]:
    """New weights and keep-mask. ``w`` is (rows, cols), ``u`` from `upper_factor`, of one dtype.

    ``choose(scores, begin, end)`` gives the (rows, end - begin) keep-mask of each `every` columns
    from the scores ``w^2 / u_jj^2`` of the weights as they are by then.
    """
    wt, diag, cols = w.T.clone(memory_format=torch.contiguous_format), u.diagonal(), w.shape[1]
    drop = torch.zeros_like(wt, dtype=torch.bool)
    solve = errors_by_columns if wt.device.type == "cpu" else errors_by_solving
    stripe = max(1, STRIPE // every) * every
    for begin in range(0, cols, stripe):
        end = min(begin + stripe, cols)
        errors = torch.empty_like(wt[begin:end])
        for first in range(begin, end, every):
            last = min(first + every, end)
            scores = (wt[first:last] / diag[first:last].unsqueeze(1)).square_().T
            drop[first:last] = ~choose(scores, first, last).T
            for low in range(first, last, PANEL):
                high = min(low + PANEL, last)
                part = errors[low - begin : high - begin]
                solve(wt[low:high], u[low:high, low:high], drop[low:high], part)
                wt[high:end].addmm_(u[low:high, high:end].T, part, alpha=-1)
        wt[end:].addmm_(u[begin:end, end:].T, errors, alpha=-1)
    return wt.masked_fill_(drop, 0).T, ~drop.T


def stripe_counts(
    parts: Sequence[Tensor], drop: int, all_reduce: Callable[[Tensor], Tensor]
) -> list[list[int]]:
    """How many weights of each `STRIPE` columns are to be gone, `drop` in all, zeros included.

    What goes anew is shared in proportion to what is there. ``parts`` are (rows, cols) matrices
    that are swept one by one; ``all_reduce`` sums over the ranks that hold other rows of them.
    """
    stripes = [torch.split(part, STRIPE, dim=1) for part in parts]
    flat = [stripe for each in stripes for stripe in each]
    counts = torch.tensor([[s.numel(), int(s.count_nonzero())] for s in flat])
    sizes, alive = all_reduce(counts).T
    fresh = drop - int((sizes - alive).sum())
    ends = alive.cumsum(0) * fresh // max(1, int(alive.sum()))
    each_drop = (sizes - alive) + ends.diff(prepend=torch.zeros(1, dtype=torch.int64))
    return [part.tolist() for part in torch.split(each_drop, [len(each) for each in stripes])]
