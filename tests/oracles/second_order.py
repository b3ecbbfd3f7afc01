"""Slow and obvious answers for second-order pruning: float64, loops.

A block has weights ``w`` (d,), a Fisher matrix ``f`` (d, d) and its inverse ``c``. ``gone`` is a
list of positions.
"""

import itertools

import numpy as np
import torch
from torch import nn

import prunus

from tests.oracles.pruning import global_keep

mse = nn.functional.mse_loss


def fisher(grads, damp):
    """``damp I + 1/m sum g g^T`` of (d,) gradients."""
    f = damp * torch.eye(len(grads[0]), dtype=torch.float64)
    for g in grads:
        f += torch.outer(g.double(), g.double()) / len(grads)
    return f


def inverse(f):
    return torch.from_numpy(np.linalg.inv(f.numpy()))


def blocks_of_row(cols, block_size):
    """Column slices of the blocks of one row; the last may be smaller."""
    return [slice(b, min(b + block_size, cols)) for b in range(0, cols, block_size)]


def per_block(grads, damp, block_size, function, *matrices):
    """(rows, cols) of ``function(f, *parts)`` for each block of each row.

    ``grads`` are (rows, cols), one for each micro-batch.
    """
    result = torch.zeros(matrices[0].shape, dtype=torch.float64)
    for r in range(result.shape[0]):
        for cut in blocks_of_row(result.shape[1], block_size):
            f = fisher([g[r, cut] for g in grads], damp)
            result[r, cut] = function(f, *(m[r, cut] for m in matrices))
    return result


def quadratic(f, dw):
    return float(dw @ f @ dw) / 2


def obs_scores(c, w):
    return torch.stack([w[i] ** 2 / (2 * c[i, i]) for i in range(len(w))])


def obs_group_scores(c, w, group):
    """For each `group` consecutive weights Q, ``1/2 w_Q^T (C_QQ)^-1 w_Q``."""
    cuts = [slice(b, b + group) for b in range(0, len(w), group)]
    return torch.stack([w[q] @ inverse(c[q, q].contiguous()) @ w[q] / 2 for q in cuts])


def obs_update(c, w, gone):
    """``w - C (w_P / diag(C)_P)``, and then zero at P."""
    w = w.clone()
    step = sum((c[:, p] * w[p] / c[p, p] for p in gone), torch.zeros_like(w))
    w -= step
    w[gone] = 0
    return w


def eliminate(c, w, order):
    """The weights after eliminating in this order, one by one."""
    c, w = c.clone(), w.clone()
    for p in order:
        w -= c[:, p] * w[p] / c[p, p]
        c -= torch.outer(c[:, p], c[p, :]) / c[p, p]
        w[p] = 0
        c[p, :], c[:, p] = 0, 0
    return w


def cap_trace(c, w, may_go=lambda p, gone: True):
    """The greedy elimination: (order, cumulative losses in that order, weights after each).

    ``may_go(p, gone)`` can forbid a weight, given those gone by then.
    """
    c, w = c.clone(), w.clone()
    alive = [i for i in range(len(w)) if w[i] != 0]
    order, losses, trace, cost = [], [], [], 0.0
    while allowed := [i for i in alive if may_go(i, order)]:
        p = min(allowed, key=lambda i: float(w[i] ** 2 / c[i, i]))
        cost += float(w[p] ** 2 / (2 * c[p, p]))
        w = w - c[:, p] * w[p] / c[p, p]
        c = c - torch.outer(c[:, p], c[p, :]) / c[p, p]
        w[p] = 0
        alive.remove(p)
        order.append(p)
        losses.append(cost)
        trace.append(w.clone())
    return order, losses, trace


def cap_losses(c, w):
    """The losses of `cap_trace` at their weights' places, 0 where there was no weight."""
    order, losses, _ = cap_trace(c, w)
    return at_places(order, losses, w)


def cap_increases(c, w):
    """What each weight of `cap_trace` adds to the loss, or one that went before it, if that is more."""
    order, losses, _ = cap_trace(c, w)
    added = [loss - before for loss, before in zip(losses, [0, *losses], strict=False)]
    return at_places(order, [max(added[: k + 1]) for k in range(len(added))], w)


def at_places(order, values, w):
    result = torch.zeros_like(w)
    for p, value in zip(order, values, strict=True):
        result[p] = value
    return result


def cap_groups_keep(c, w, n, m):
    """Keep-mask of the greedy in which every m consecutive weights keep n; zeros count as gone."""
    zeros = [i for i in range(len(w)) if w[i] == 0]

    def may_go(p, gone):
        return sum(q // m == p // m for q in [*gone, *zeros]) < m - n

    gone = cap_trace(c, w, may_go)[0]
    return torch.tensor([i not in gone and i not in zeros for i in range(len(w))])


def group_solve(c, w, gone):
    """``w - C[:, P] (C_PP)^-1 w_P``."""
    if not gone:
        return w.clone()
    new = w - c[:, gone] @ torch.linalg.solve(c[gone][:, gone], w[gone])
    new[gone] = 0
    return new


def group_loss(c, w, gone):
    """``1/2 w_P^T (C_PP)^-1 w_P``."""
    return float(w[gone] @ torch.linalg.solve(c[gone][:, gone], w[gone])) / 2 if gone else 0.0


def least_loss(f, w, k):
    """The least loss of any k weights' going, by trying all."""
    c, subsets = inverse(f), itertools.combinations(range(len(w)), k)
    return min(quadratic(f, group_solve(c, w, list(gone)) - w) for gone in subsets)


def upper_factor(h):
    """Upper triangular U with ``U^T U = H^-1``."""
    return torch.from_numpy(np.linalg.cholesky(np.linalg.inv(h.numpy())).T.copy())


def column_loop(w, u, choose, every):
    """SparseGPT's algorithm 1 as published, and its loss, ``1/2 sum e^2``."""
    w, keep, loss = w.clone(), torch.ones_like(w, dtype=torch.bool), 0.0
    for i in range(w.shape[1]):
        if i % every == 0:
            end = min(i + every, w.shape[1])
            scores = w[:, i:end] ** 2 / u.diagonal()[i:end] ** 2
            keep[:, i:end] = choose(scores, i, end)
        e = torch.where(keep[:, i], 0, w[:, i]) / u[i, i]
        w[:, i:] -= torch.outer(e, u[i, i:])
        w[~keep[:, i], i] = 0
        loss += float(e @ e) / 2
    return w, keep, loss


def net(cols=6):
    """Blocks of four divide neither 6 nor 10 columns."""
    torch.manual_seed(1)
    layers = nn.Linear(cols, 10), nn.Tanh(), nn.Linear(10, 5), nn.Tanh(), nn.Linear(5, 3)
    return nn.Sequential(*layers).double()


def batches(number=5, cols=6):
    generator = torch.Generator().manual_seed(2)
    xs = torch.randn(number, 7, cols, generator=generator, dtype=torch.float64)
    return [(x, torch.sin(3 * x[:, :3])) for x in xs]


def data_for(model, number=5, **more):
    return prunus.Calibration(batches(number, model[0].in_features), mse, **more)


def weights(model):
    return [p for p in model.parameters() if p.dim() == 2]


def masked_gradients(model, data):
    """For each weight its gradients, one for each batch, where it is not zero."""
    ws, found = weights(model), []
    for x, y in data:
        found.append(torch.autograd.grad(mse(model(x), y), ws))
    return [[g[i] * (w.detach() != 0) for g in found] for i, w in enumerate(ws)]


def watched(model, seen, fails_at=None, number=4):
    """Data whose loss notes the sparsity it meets, and may fail."""

    def forward(model, batch):
        ws = weights(model)
        seen.append(sum(int((w == 0).sum()) for w in ws) / sum(w.numel() for w in ws))
        if len(seen) == fails_at:
            raise ArithmeticError("no loss")
        return mse(model(batch[0]), batch[1])

    return prunus.Calibration(batches(number, model[0].in_features), forward=forward)


def gone_of(keep):
    return (~keep).nonzero().squeeze(1).tolist()


RAMPS = {
    "linear": lambda t, a, b: a + (b - a) * t,
    "cubic": lambda t, a, b: b - (b - a) * (1 - t) ** 3,
    "geometric": lambda t, a, b: 1 - (1 - a) ** (1 - t) * (1 - b) ** t,
}
SLOW = {  # scores and new weights of a block
    "obs": (
        lambda f, w: obs_scores(inverse(f), w),
        lambda f, w, keep: obs_update(inverse(f), w, gone_of(keep)),
    ),
    "cap": (
        lambda f, w: cap_increases(inverse(f), w),
        lambda f, w, keep: group_solve(inverse(f), w, gone_of(keep)),
    ),
}
SLOW["loss"] = (lambda f, w: cap_losses(inverse(f), w), SLOW["cap"][1])


def slowly_pruned(model, data, pruner, sparsity):
    scores, update = SLOW["loss" if getattr(pruner, "score", "") == "loss" else pruner.name]
    grads, ws = masked_gradients(model, data), [w.detach() for w in weights(model)]
    settings = pruner.damp, pruner.block_size
    ranked = [
        per_block(g, *settings, scores, w).masked_fill(w == 0, -1)
        for g, w in zip(grads, ws, strict=True)
    ]
    keeps = global_keep(ranked, round(sparsity * sum(w.numel() for w in ws)))
    return [
        per_block(g, *settings, update, w, keep)
        for g, w, keep in zip(grads, ws, keeps, strict=True)
    ]
