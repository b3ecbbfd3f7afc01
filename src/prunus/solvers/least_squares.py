"""Weights that make up for the pruned ones, by least squares over what a fixed mask keeps.

Everywhere ``dense`` is (rows, cols), the weights before pruning; ``gram`` is (cols, cols), the sum
of ``x x^T`` over the inputs x (positive semidefinite, perhaps singular); both are of one dtype, on
one device. The error of new weights w is ``tr((w - dense) G (w - dense)^T)``, the squared change
of the outputs summed over the inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 0.1  # of the mean diagonal, where there are as many inputs as columns

CHUNK = 1 << 19  # weights solved at once on a CPU: what passes between two products stays in cache
MANY = 1 << 24  # elsewhere, only to bound the memory


def layer_error(dense: Tensor, w: Tensor, gram: Tensor) -> Tensor:
    """(rows,) the error of each row, summed in float64; in units of squared outputs."""
    gap = w - dense
    return (gap @ gram).mul_(gap).sum(1, dtype=torch.float64)


def relative_error(dense: Tensor, w: Tensor, gram: Tensor) -> float:
    """The error of the layer as a share of that of zero weights, ``tr(dense G dense^T)``.

    Zero where the layer puts out nothing but zeros.
    """
    whole = float(layer_error(dense, torch.zeros_like(dense), gram).sum())
    return float(layer_error(dense, w, gram).sum()) / whole if whole > 0 else 0.0


def ridge_of(samples: int, cols: int) -> float:
    """The ridge toward the dense weights, in units of the mean diagonal of G.

    With few inputs the weights that fit them best do not fit others: it grows as ``cols / samples``
    and vanishes where data abound.
    """
    return RIDGE * cols / max(1, samples)


def unit_of(t: Tensor) -> Tensor:
    """() the power of two next below the largest entry, to scale by without rounding."""
    return power_of_two(t.abs().amax() if t.numel() else t.sum())


def power_of_two(size: Tensor) -> Tensor:
    """The power of two next below each size; 1 for zero, NaN and infinity."""
    exponent = torch.where(size.isfinite() & (size > 0), size, 1).double().log2().floor()
    return exponent.exp2().to(size.dtype)


def with_ridge(gram: Tensor, ridge: float) -> Tensor:
    """(cols, cols) G with ``ridge`` times its mean diagonal on its diagonal, in a unit of its own.

    Its largest entry is between 1 and 2 before that, so that squares are finite.
    """
    gram = gram / unit_of(gram.diagonal())
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    return gram


def refit(
    dense: Tensor,
    w: Tensor,
    gram: Tensor,
    mask: Tensor,
    iterations: int = 20,
    ridge: float = 0.0,
) -> Tensor:
    """(rows, cols) weights of a smaller error where `mask` keeps, and zero elsewhere.

    Conjugate gradients on ``min tr((w - dense) G (w - dense)^T)`` over the kept entries of each
    row, preconditioned by the diagonal of G and started from ``w``, (rows, cols); an iteration is
    one product with G. As many iterations as a row keeps weights reach its minimum. The post-
    processing of X. Meng et al., "ALPS", 2024, https://arxiv.org/abs/2406.07831, section 3.3,
    but no row's error rises, and inputs that are always zero leave their weights as they were.
    ``ridge`` times the mean diagonal of G is added to its diagonal, and counts in the error.
    """
    gram = with_ridge(gram, ridge)
    most = CHUNK if dense.device.type == "cpu" else MANY
    step = max(1, most // max(1, dense.shape[1]))
    parts = zip(*(torch.split(t, step) for t in (dense, w, mask)), strict=True)
    return torch.cat([_refit_rows(gram, iterations, *part) for part in parts])


def _refit_rows(gram: Tensor, iterations: int, dense: Tensor, w: Tensor, mask: Tensor) -> Tensor:
    unit = power_of_two(dense.abs().amax(1, keepdim=True)) if dense.shape[1] else 1
    dense, w = dense / unit, w / unit
    start = torch.where(mask, w, 0)
    gap = dense - start
    r = gap @ gram
    before = (gap * r).sum(1, keepdim=True, dtype=torch.float64)
    new = _conjugate_gradients(
        start.clone(), r.mul_(mask), mask, gram, _floor(dense, gram), iterations
    )
    torch.sub(dense, new, out=gap)
    after = torch.mm(gap, gram, out=r).mul_(gap).sum(1, keepdim=True, dtype=torch.float64)
    return torch.where(after < before, new, start).mul_(unit)  # so NaN is no success either


def _floor(dense: Tensor, gram: Tensor) -> Tensor:
    """(rows, 1) the squared norm, preconditioned, of what rounding leaves in a residual.

    Below it directions are noise, and where G is singular the steps along them have no bound.
    """
    eps = torch.finfo(dense.dtype).eps
    energy = dense.square() @ gram.diagonal().unsqueeze(1)
    return energy.mul_(eps).mul_(eps * len(gram))


def _conjugate_gradients(
    w: Tensor, r: Tensor, mask: Tensor, gram: Tensor, floor: Tensor, iterations: int
) -> Tensor:
    """Improve ``w`` in place, given its masked residual ``r = (dense - w) G``, also overwritten.

    A row rests once its residual is below ``floor`` or its curvature is not positive.
    """
    diag = gram.diagonal()
    scale = torch.where(diag > 0, 1 / diag, 0)
    p = r * scale
    rz, q = (r * p).sum(1, keepdim=True), torch.empty_like(p)
    for _ in range(iterations):
        torch.mm(p, gram, out=q)
        curvature = (p * q).sum(1, keepdim=True)
        live = (rz > floor) & (curvature > 0)
        if not live.any():
            break
        step = torch.where(live, rz / curvature, 0)
        w.addcmul_(p, step)
        r.addcmul_(q.mul_(mask), step, value=-1)
        z = torch.mul(r, scale, out=q)
        fresh = (r * z).sum(1, keepdim=True)
        p.mul_(torch.where(live, fresh / rz, 0)).add_(z)
        rz = torch.where(live, fresh, 0)
    return w
