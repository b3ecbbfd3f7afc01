"""Optimal brain surgery on many small blocks at once, in float64.

Everywhere ``w`` is (n, d) weights of n blocks, ``f`` their (n, d, d) damped Fisher matrices and
``c`` the inverses of these.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prunus.solvers.cholesky import cholesky

TINY = torch.finfo(torch.float32).tiny  # scores are often kept in single precision
PANEL = 48  # columns between two updates of the whole inverse, which is the costly part


class Elimination:
    """Greedy elimination of weights, the cheapest first, in all blocks at once.

    A pivoted Cholesky factorization of the inverse: eliminating weight p takes the column
    ``u = c[:, p] / sqrt(c[p, p])``, after which ``w -= u w_p / sqrt(c[p, p])`` and ``c -= u u^T``.
    The diagonal and the weights follow at once; the rest of ``c`` (overwritten) after each panel of
    columns, as a product of matrices. ``alive`` marks the weights that are there to be eliminated.
    """

    def __init__(self, c: Tensor, w: Tensor, alive: Tensor) -> None:
        self.c, self.w = c, w.clone()
        self.diag = c.diagonal(dim1=1, dim2=2).clone()
        self.least = self.diag * 1e-14  # rounding must not take it to zero
        self.barred = torch.where(alive, 0.0, math.inf).to(w.dtype)
        self.diag.masked_fill_(~alive, math.inf)
        self.cost = w.new_zeros(len(w), 1)
        self.losses = torch.zeros_like(w)
        self.columns = c.new_empty(len(w), min(PANEL, w.shape[1]), w.shape[1])
        self.filled = 0
        self.block = torch.arange(len(w), device=w.device)

    def prices(self) -> Tensor:
        """(n, d) ``w^2 / c_pp`` of what is left, infinite for the rest."""
        return self.w.square().div_(self.diag).add_(self.barred)

    def step(self) -> tuple[Tensor, Tensor]:
        """Eliminate one weight of each block: (n, 1) where, and whether there was one left."""
        price, p = self.prices().min(1, keepdim=True)
        left = price.isfinite()
        self.cost += torch.where(left, price / 2, 0)
        self.losses.scatter_(1, p, torch.where(left, self.cost, self.losses.gather(1, p)))
        column = self.c[self.block, p.squeeze(1)].unsqueeze(1)
        if k := self.filled:
            known = self.columns[:, :k]
            at_p = known.gather(2, p.unsqueeze(1).expand(-1, k, 1)).mT
            column = torch.baddbmm(column, at_p, known, alpha=-1)
        scale = torch.where(left, self.diag.gather(1, p).rsqrt(), 0)
        u = column.squeeze(1) * scale
        self.columns[:, k] = u
        self.filled += 1
        self.w.addcmul_(u, self.w.gather(1, p) * scale, value=-1)
        self.diag.addcmul_(u, u, value=-1).clamp_(min=self.least)
        self.diag.scatter_(1, p, torch.where(left, math.inf, self.diag.gather(1, p)))
        self.barred.scatter_(1, p, math.inf)
        if self.filled == self.columns.shape[1]:
            self.c.baddbmm_(self.columns.mT, self.columns, alpha=-1)
            self.filled = 0
        return p, left


def greedy_losses(c: Tensor, w: Tensor) -> Tensor:
    """(n, d) the loss increase of each block once the weight has gone, cheapest first.

    Weights that are zero cost nothing and are left out (loss 0). ``c`` is overwritten.
    """
    alive = w != 0
    run = Elimination(c, w, alive)
    for _ in range(int(alive.sum(1).max())):
        run.step()
    return run.losses


def increases(losses: Tensor) -> Tensor:
    """(n, d) what each weight adds to the loss of its block, of `greedy_losses`.

    At least as much as any weight that went before it, so that a ranking of all blocks together
    takes a prefix of every block. Where the losses are convex no other choice of prefixes has a
    smaller sum of losses.
    """
    loss, order = losses.sort(1)
    rises = loss.diff(dim=1, prepend=loss.new_zeros(len(loss), 1)).cummax(1).values
    return torch.empty_like(losses).scatter_(1, order, rises)


def greedy_losses_of_groups(c: Tensor, w: Tensor, n: int, m: int) -> Tensor:
    """The same, keeping n of every m consecutive weights; zeros count as gone.

    What a block keeps ranks above everything that went from it. ``c`` is overwritten; m divides d.
    """
    alive = w != 0
    run = Elimination(c, w, alive)
    spare = alive.view(len(w), -1, m).sum(2) - n  # how many each group has still to give
    barred = run.barred.view(len(w), -1, m)
    barred.masked_fill_((spare <= 0).unsqueeze(2), math.inf)
    for _ in range(int(spare.clamp(min=0).sum(1).max())):
        p, left = run.step()
        spare.scatter_add_(1, p // m, -left.long())
        barred.masked_fill_((spare <= 0).unsqueeze(2), math.inf)
    rest = run.w.square().div_(run.diag).add_(2 * run.cost)
    rest.add_(min(TINY, 1e-30 * float(rest.amax())) if rest.numel() else 0)
    return torch.where(run.diag.isinf(), run.losses, rest)


def group_solve(f: Tensor, w: Tensor, keep: Tensor) -> Tensor:
    """(n, d) the weights that minimize the quadratic loss where `keep` drops the others.

    ``w - C[:, P] C_PP^-1 w_P``, computed without the inverse: ``F_KK dw_K = F_KP w_P`` for the
    kept K and the dropped P.
    """
    rhs = torch.bmm(f, torch.where(keep, 0, w).unsqueeze(2)).squeeze(2)
    most = int(keep.sum(1).max())
    if most == 0:
        return torch.zeros_like(w)
    # a block with fewer kept weights is filled up with dropped ones, which the identity decouples
    order = keep.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
    kept = keep.gather(1, order)
    at = order.unsqueeze(2) * f.shape[2] + order.unsqueeze(1)
    square = f.flatten(1).gather(1, at.flatten(1)).view_as(at)
    square *= (kept.unsqueeze(1) & kept.unsqueeze(2)).to(f.dtype)
    diag = square.diagonal(dim1=1, dim2=2)
    scale = diag.sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)
    diag.add_(torch.where(kept, 0, torch.where(scale > 0, scale, 1)))
    rhs = torch.where(kept, rhs.gather(1, order), 0)
    step = torch.cholesky_solve(rhs.unsqueeze(2), cholesky(square)).squeeze(2)
    return torch.where(keep, w, 0).scatter_add_(1, order, torch.where(kept, step, 0))


def first_order_step(c: Tensor, w: Tensor, keep: Tensor) -> Tensor:
    """(n, d) ``w - C (w_P / diag(C)_P)``, zero at P, where P is what `keep` drops."""
    diag = c.diagonal(dim1=1, dim2=2)
    step = torch.bmm(c, torch.where(keep, 0, w / diag).unsqueeze(2)).squeeze(2)
    return torch.where(keep, w - step, 0)


def saliency(c: Tensor, w: Tensor, group: int = 1) -> Tensor:
    """(n, d) ``1/2 w_Q^T (C_QQ)^-1 w_Q`` for every `group` consecutive weights Q.

    Shared equally among a group's weights that are not zero, so that their sum is the group's.
    """
    n, d = w.shape
    if group == 1:
        return w.square() / c.diagonal(dim1=1, dim2=2) / 2
    at = torch.arange(d // group, device=w.device)
    parts = c.view(n, d // group, group, d // group, group)[:, at, :, at].transpose(0, 1)
    each = w.view(-1, group, 1)
    solved = torch.cholesky_solve(each, cholesky(parts.reshape(-1, group, group)))
    loss = (each * solved).sum(1) / 2
    alive = (each != 0).squeeze(2)
    share = loss / alive.sum(1, keepdim=True).clamp(min=1)
    return torch.where(alive, share, 0).view(n, d)
