"""Better masks for weights that stay as they are: one weight comes back, another one goes.

``dense`` is (rows, cols), the weights before pruning; ``mask`` boolean (rows, cols), True = kept;
``gram`` (cols, cols), the sum of ``x x^T`` over the inputs. With d the dropped weights of a row
(zero where it keeps) and ``g = G d``, its error is ``E = d^T G d``. To flip entry k adds v_k to d:
``-w_k`` where it was dropped, ``w_k`` where it was kept. Flipping i and j changes E by
``t_i + t_j + Q_ij``, in which ``t_k = 2 v_k g_k + v_k^2 G_kk`` and ``Q_ij = 2 v_i v_j G_ij``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

CANDIDATES = 32  # of each side, of which all pairs are examined
AT_ONCE = 16  # swaps among these before others are sought among all columns, which costs more
CHUNK = 1 << 20  # weights whose rows swap at once: bounds the copies
STRIPE = 128  # columns of groups after which the rest of the matrix learns of the swaps


def swap(
    dense: Tensor, gram: Tensor, mask: Tensor, rounds: int, group: int | None = None
) -> Tensor:
    """(rows, cols) a mask of smaller error, with as many kept in each row, or `group` of columns.

    Without `group`, up to ``rounds`` swaps in each row; with it, up to ``rounds`` passes with one
    swap in each group of consecutive columns. No error rises, and a weight that is zero in
    ``dense`` does not come back. Ends early where no swap helps.

    Raises ValueError if ``group`` does not divide the columns.
    """
    if group is not None:
        if dense.shape[1] % group:
            raise ValueError(
                f"`group={group}` does not divide {dense.shape[1]} columns; use one that does"
            )
        return swap_in_groups(dense, gram, mask, rounds, group)
    step = max(1, CHUNK // max(1, dense.shape[1]))
    parts = zip(torch.split(dense, step), torch.split(mask, step), strict=True)
    return torch.cat([swap_in_rows(part, gram, keep, rounds) for part, keep in parts])


def _least(dense: Tensor, gram: Tensor) -> Tensor:
    """(rows,) the smallest gain that rounding does not feign; arguments as of `swap`."""
    return dense.square() @ gram.diagonal() * torch.finfo(dense.dtype).eps


def swap_in_rows(dense: Tensor, gram: Tensor, mask: Tensor, rounds: int) -> Tensor:
    """(rows, cols) the mask after up to ``rounds`` swaps in each row, the best among candidates.

    These are the `CANDIDATES` dropped and kept entries of the lowest ``t``, sought anew after
    `AT_ONCE` swaps; in between, ``t`` of the candidates follows exactly.
    """
    keep, least, k = mask.clone(), _least(dense, gram).unsqueeze(1), min(CANDIDATES, len(gram))
    g = torch.where(mask, 0, dense) @ gram
    while rounds > 0:
        v = torch.where(keep, dense, -dense)
        t = torch.addcmul(2 * g, v, gram.diagonal()).mul_(v)
        out = t.masked_fill(keep | (dense == 0), math.inf).topk(k, largest=False, sorted=False)
        into = t.masked_fill_(~keep, math.inf).topk(k, largest=False, sorted=False)
        at = torch.cat((out.indices, into.indices), 1)
        v = v.gather(1, at)
        q = gram[at.unsqueeze(2), at.unsqueeze(1)].mul_(2 * v.unsqueeze(1)).mul_(v.unsqueeze(2))
        prices = torch.cat((out.values, into.values), 1)
        flip = _swaps_among(prices, q, least, min(AT_ONCE, rounds))
        if not flip.any():
            break
        g += embedding_bag(at, gram, mode="sum", per_sample_weights=torch.where(flip, v, 0))
        # a candidate can stand on both sides, infinite on one; so flips are counted, not written
        keep ^= torch.zeros_like(g).scatter_add_(1, at, flip.to(g.dtype)) > 0
        rounds -= AT_ONCE
    return keep


def _swaps_among(t: Tensor, q: Tensor, least: Tensor, swaps: int) -> Tensor:
    """(rows, 2k) which of k dropped and then k kept candidates flip in up to ``swaps`` swaps.

    ``t`` is (rows, 2k), infinite where an entry may not flip; ``q`` is (rows, 2k, 2k).
    """
    k, row = t.shape[1] // 2, torch.arange(len(t), device=t.device)
    crossing, barred = q[:, :k, k:].contiguous(), t.isinf()
    for _ in range(swaps):
        price = (t[:, :k].unsqueeze(2) + t[:, k:].unsqueeze(1)).add_(crossing)
        best, pair = price.flatten(1).min(1, keepdim=True)
        good = best < -least
        if not good.any():
            break
        i, j = pair // k, pair % k + k
        t = t + torch.where(good, q[row, i.squeeze(1)] + q[row, j.squeeze(1)], 0)
        both = torch.cat((i, j), 1)
        t.scatter_(1, both, torch.where(good, math.inf, t.gather(1, both)))
    return t.isinf() & ~barred


def swap_in_groups(dense: Tensor, gram: Tensor, mask: Tensor, rounds: int, m: int) -> Tensor:
    """(rows, cols) the mask after up to ``rounds`` passes over the groups of ``m`` columns.

    A group makes its best swap in all rows at once, knowing of those of the groups before it.
    """
    # columns lie in memory one after the other
    wt = dense.T.contiguous()
    keep = mask.T.clone(memory_format=torch.contiguous_format)
    least, g = _least(dense, gram), gram @ torch.where(keep, 0, wt)
    for _ in range(rounds):
        before = keep.clone()
        for begin in range(0, len(wt), max(1, STRIPE // m) * m):
            _swap_in_stripe(wt, gram, keep, g, least, begin, m)
        if torch.equal(before, keep):
            break
    return keep.T.contiguous()


def _swap_in_stripe(
    wt: Tensor, gram: Tensor, keep: Tensor, g: Tensor, least: Tensor, begin: int, m: int
) -> None:
    """One pass over the groups of the stripe of columns that starts at ``begin``.

    ``wt`` is (cols, rows), as are ``keep`` and ``g``, which are updated; ``gram`` is (cols, cols),
    ``least`` (rows,).
    """
    end = min(begin + max(1, STRIPE // m) * m, len(wt))
    changes = torch.zeros_like(wt[begin:end])
    for first in range(begin, end, m):
        at = slice(first, first + m)
        v = torch.where(keep[at], wt[at], -wt[at])
        flip = _best_swap(v, g[at], gram[at, at], keep[at], least)
        keep[at] ^= flip
        change = torch.mul(v, flip, out=changes[first - begin : first - begin + m])
        g[begin:end].addmm_(gram[begin:end, at], change)
    g[:begin].addmm_(gram[:begin, begin:end], changes)
    g[end:].addmm_(gram[end:, begin:end], changes)


def _best_swap(v: Tensor, g: Tensor, gram: Tensor, keep: Tensor, least: Tensor) -> Tensor:
    """(m, rows) which two entries flip, none where no swap helps.

    ``v``, ``g`` and ``keep`` are (m, rows), ``gram`` is (m, m), ``least`` (rows,).
    """
    m = len(v)
    t = torch.addcmul(2 * g, v, gram.diagonal().unsqueeze(1)).mul_(v)
    out = t.masked_fill(keep | (v == 0), math.inf)
    into = t.masked_fill_(~keep, math.inf)
    price = (v.unsqueeze(1) * (2 * gram).unsqueeze(2)).mul_(v)
    best, pair = price.add_(out.unsqueeze(1)).add_(into).flatten(0, 1).min(0)
    entry = torch.arange(m, device=v.device).unsqueeze(1)
    return ((entry == pair // m) | (entry == pair % m)) & (best < -least)
