"""Masks and weights found together, by splitting the layer's least squares from its pattern.

X. Meng, K. Behdin, H. Wang and R. Mazumder, "ALPS: Improved Optimization for Highly Sparse
One-Shot Pruning for Large Language Models", 2024, https://arxiv.org/abs/2406.07831, algorithm 1.
In units in which H, the damped Gram, has a unit diagonal, and with b the dense weights::

    w = b + (rho (d - b) - v) (H + rho I)^-1
    d = w + v / rho,  where the pattern keeps it
    v = v + rho (w - d)

Ours starts from a lower penalty, solves for the first mask too and returns the better solution,
and factors the matrix anew for each penalty: a dozen Cholesky factorizations cost less than one
eigendecomposition. All is done in the dtype of the weights: the unit diagonal and the penalty
bound the condition by ``1 + cols / rho``, which single precision bears.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prunus.solvers.cholesky import cholesky
from prunus.solvers.least_squares import layer_error, refit, unit_of

# of the unit diagonal; the paper's 0.1 ends sooner, at errors 2 to 25 % higher, on new inputs too
FIRST_PENALTY = 0.03
EVERY = 3  # iterations between two looks at the support
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # share of the support that changed, and factor

Project = Callable[[Tensor], Tensor]


def solve(
    dense: Tensor,
    gram: Tensor,
    project: Project,
    iterations: int = 300,
    damp: float = 0.01,
    ridge: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """New weights and keep-mask, both (rows, cols), of the pattern that `project` enforces.

    ``dense`` is (rows, cols), the weights before pruning.
    ``project(scores)`` gives the keep-mask of the highest scores, (rows, cols), that the pattern
    allows, and never keeps what is zero in ``dense``. ``gram`` is (cols, cols), the sum of
    ``x x^T`` over the inputs; `damp`, in units of its mean diagonal, goes to the diagonal while
    masks are sought. The error is never above that of `refit` with the mask
    ``project(dense^2 diag(gram))``. `ridge`, in the same units, counts when they are solved for.
    """
    size = unit_of(dense)
    dense, gram = dense / size, gram / unit_of(gram.diagonal())
    first = project(dense.square() * gram.diagonal())
    w, mask = support(dense, gram, first, project, iterations, damp)
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    results = [(refit(dense, dense, gram, first), first), (refit(dense, w, gram, mask), mask)]
    new, mask = min(results, key=lambda each: float(layer_error(dense, each[0], gram).sum()))
    return new * size, mask


def support(
    dense: Tensor, gram: Tensor, first: Tensor, project: Project, iterations: int, damp: float
) -> tuple[Tensor, Tensor]:
    """The last weights d within the pattern, and their mask, once it stands still.

    Both are (rows, cols), as ``dense`` and the mask ``first`` to begin with; ``gram`` is
    (cols, cols).
    """
    h, scale = _unit_diagonal(gram, damp)
    b, rho = dense * scale, FIRST_PENALTY
    d, keep, previous = b * first, first, first
    v, inverse = torch.zeros_like(b), _shifted_inverse(h, rho)
    for i in range(1, iterations + 1):
        w = torch.addmm(b, (d - b).mul_(rho).sub_(v), inverse)
        d = torch.add(w, v, alpha=1 / rho)
        keep = project(d.square())
        d.mul_(keep)
        v.add_(w.sub_(d), alpha=rho)
        if i % EVERY == 0:
            if torch.equal(keep, previous):
                break
            rho *= _growth(keep, previous)
            inverse, previous = _shifted_inverse(h, rho), keep
    return d / scale, keep


def _growth(keep: Tensor, previous: Tensor) -> float:
    """By how much the penalty rises after two masks, (rows, cols)."""
    changed = int((keep ^ previous).count_nonzero()) / max(1, int(keep.count_nonzero()))
    return next(factor for least, factor in GROWTH if changed > least)


def _unit_diagonal(gram: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """(cols, cols) the damped Gram over its diagonal's root on both sides; (cols,) that root."""
    diag = gram.diagonal()
    damped = diag + damp * diag.mean()
    scale = torch.where(damped > 0, damped, 1).sqrt_()
    h = gram / scale / scale.unsqueeze(1)
    h.diagonal().copy_(damped / scale / scale)
    return h, scale


def _shifted_inverse(h: Tensor, rho: float) -> Tensor:
    """(cols, cols) ``(h + rho I)^-1``."""
    shifted = h.clone()
    shifted.diagonal().add_(rho)
    return torch.cholesky_inverse(cholesky(shifted.unsqueeze(0))[0])
