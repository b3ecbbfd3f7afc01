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


def panel_errors(w: Tensor, u: Tensor, drop: Tensor) -> Tensor:
    """(rows, k) the scaled errors ``e_i = (w_i - q_i) / u_ii`` of sweeping over k columns.

    With the mask known, the recursion is one triangular system for each row, ``E M = w * drop``, in
    which column j of M is that of U where row r drops j and of the identity where it keeps it.
    ``w`` is (rows, k), ``u`` (k, k), ``drop`` boolean.
    """
    eye = torch.eye(len(u), dtype=u.dtype, device=u.device)
    system = torch.where(drop.unsqueeze(1), u, eye)  # (rows, k, k)
    rhs = torch.where(drop, w, 0).unsqueeze(1)
    errors: Tensor = torch.linalg.solve_triangular(system, rhs, upper=True, left=False)
    return errors.squeeze(1)


def sweep(w: Tensor, u: Tensor, choose: Choose, every: int = STRIPE) -> tuple[Tensor, Tensor]:
    """New weights and keep-mask. ``w`` is (rows, cols), ``u`` from `upper_factor`, both float64.

    ``choose(scores, begin, end)`` gives the (rows, end - begin) keep-mask of each `every` columns
    from the scores ``w^2 / u_jj^2`` of the weights as they are by then.
    """
    w, diag, cols = w.clone(), u.diagonal(), w.shape[1]
    keep = torch.ones_like(w, dtype=torch.bool)
    stripe = max(1, STRIPE // every) * every
    for begin in range(0, cols, stripe):
        end = min(begin + stripe, cols)
        errors = torch.empty_like(w[:, begin:end])
        for first in range(begin, end, every):
            last = min(first + every, end)
            scores = (w[:, first:last] / diag[first:last]).square_()
            keep[:, first:last] = choose(scores, first, last)
            for low in range(first, last, PANEL):
                high = min(low + PANEL, last)
                e = panel_errors(w[:, low:high], u[low:high, low:high], ~keep[:, low:high])
                errors[:, low - begin : high - begin] = e
                w[:, low:end] -= e @ u[low:high, low:end]
        w[:, end:] -= errors @ u[begin:end, end:]
    return w.masked_fill_(~keep, 0), keep


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
