"""Batches of small positive definite matrices: factors, inverses, and inverses by the dual form."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

log = logging.getLogger("prunus")
FIRST_JITTER = 1e-10  # of the mean diagonal; single-precision sums are off by about 1e-7
LAST_JITTER = 1e-2


def cholesky(a: Tensor) -> Tensor:
    """Lower factors of ``a``, which is (n, d, d), symmetric, and not changed.

    A matrix that is not positive definite to working precision has more and more added to its
    diagonal, from 1e-10 of the diagonal's mean on, until it is; the log says so.

    Raises ValueError if a hundredth of the mean does not suffice.
    """
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(a)
    if not info.any():
        return factor
    bad = info.nonzero().squeeze(1)
    failed = len(bad)
    mean = a[bad].diagonal(dim1=1, dim2=2).mean(1)
    jitter = FIRST_JITTER
    while len(bad):
        if jitter > LAST_JITTER * 1.5 or not bool((mean > 0).all()):
            raise ValueError(
                f"{len(bad)} of {len(a)} matrices of the statistics are not positive definite; "
                "raise 'damp'"
            )
        shifted = a[bad].clone()
        shifted.diagonal(dim1=1, dim2=2).add_((jitter * mean).unsqueeze(1))
        parts, info = torch.linalg.cholesky_ex(shifted)
        good = info == 0
        factor[bad[good]] = parts[good]
        bad, mean = bad[~good], mean[~good]
        jitter *= 10
    log.warning(
        "%d of %d blocks were not positive definite; up to %.0e of their mean diagonal was added "
        "(a larger 'damp' does the same in the open)",
        failed,
        len(a),
        jitter / 10,
    )
    return factor


def invert_lower(lower: Tensor) -> Tensor:
    """Invert lower triangular matrices, (n, d, d), in place; zeros above stay.

    By halves: most of the work is products of matrices, which batch well.
    """
    d = lower.shape[-1]
    if d <= 32:
        eye = torch.eye(d, dtype=lower.dtype, device=lower.device).expand_as(lower)
        return lower.copy_(torch.linalg.solve_triangular(lower, eye, upper=False))
    half = d // 2
    first, second = invert_lower(lower[:, :half, :half]), invert_lower(lower[:, half:, half:])
    below = lower[:, half:, :half]
    below.copy_(second @ (below @ first)).neg_()
    return lower


def inverse(a: Tensor) -> Tensor:
    """Inverses of ``a``, (n, d, d) and positive definite. Raises ValueError as `cholesky` does."""
    inv = invert_lower(cholesky(a))
    return inv.mT @ inv


def resolvable_damp(damp: float, mean: Tensor) -> Tensor:
    """(n,) the damp, or 1e-10 of the mean diagonal of ``G^T G / m``, (n,), where that is more.

    For matrices that are singular without it: their inverse spans ``mean / damp`` in size, of which
    working precision would leave noise. The log says so.
    """
    damps = (FIRST_JITTER * mean).clamp(min=damp)
    if raised := int((damps > damp).count_nonzero()):
        log.warning(
            "%d of %d blocks were not positive definite to working precision: damp=%g is too small "
            "beside gradients of this size; up to %.1e was taken (a larger 'damp', or a loss that "
            "is a mean, does it in the open)",
            raised, len(damps), damp, float(damps.max()),
        )  # fmt: skip
    return damps


def dual_inverse(g: Tensor, damp: float) -> Tensor:
    """Inverses of ``damp I + G^T G / m`` by way of the (m, m) matrix ``m damp I + G G^T``.

    ``g`` is (n, m, d): m samples of each of n blocks. Cheaper than `inverse` where m < d
    (Sherman, Morrison and Woodbury). A damp too small to be resolved beside G is raised, see
    `resolvable_damp`.
    """
    m, d = g.shape[1:]
    gram = g @ g.mT
    damps = resolvable_damp(damp, gram.diagonal(dim1=1, dim2=2).sum(1) / (m * d)).unsqueeze(1)
    gram.diagonal(dim1=1, dim2=2).add_(m * damps)
    half: Tensor = torch.linalg.solve_triangular(cholesky(gram), g, upper=False)
    result = (half.mT @ half).neg_()
    result.diagonal(dim1=1, dim2=2).add_(1)
    return result.div_(damps.unsqueeze(2))
