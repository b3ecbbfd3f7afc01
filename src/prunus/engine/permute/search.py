"""Column orders in which the best N:M mask keeps more of the score.

Y. Zhang, H. Bai, H. Lin, J. Zhao, L. Hou and C. V. Cannistraci, "Plug-and-play: an efficient
post-training pruning method for large language models", ICLR 2024,
https://openreview.net/forum?id=Tr0lPx9woF. The paper's program sorts M columns anew for every pair
of a group and a column; here the columns of a group that do not move are sorted once, and a pair
costs one maximum and one sum.

Everywhere ``scores`` is (rows, cols) finite importances of any unit, not negative, on any device;
N of every M consecutive columns are kept; a permutation ``perm`` is a LongTensor (cols,) and stands
for ``scores[:, perm]``. The columns ``perm[g * m : (g + 1) * m]`` are group g, one in each lane.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from prunus.solvers.selection import count_non_finite, largest

# entries of a lane examined in one go
IN_CACHE = 1 << 19
ON_GPU = 1 << 22


def retained(scores: Tensor, n: int, m: int, perm: Tensor | None = None) -> float:
    """The score that the best N:M mask keeps, a sum in double precision.

    Without ``perm`` the columns stay in their order. Looks at a few rows at a time.

    Raises:
        ValueError: ``m`` does not divide the columns, ``n`` is not from 1 to m - 1, or a score is
            not finite.
    """
    _check(scores, n, m)
    perm = torch.arange(scores.shape[1], device=scores.device) if perm is None else perm
    pieces = (largest(lanes, n) for lanes in _lanes(scores, perm, m))
    return sum(float(best.sum(dtype=torch.float64)) for piece in pieces for best in piece)


def kept_shares(matrices: Sequence[Tensor], perms: Tensor, n: int, m: int) -> tuple[float, float]:
    """Shares of all scores that are kept in the order as it is, and by a permutation of each.

    Raises as `retained` does.
    """
    before = sum(retained(scores, n, m) for scores in matrices)
    after = sum(retained(s, n, m, perm) for s, perm in zip(matrices, perms, strict=True))
    total = max(sum(float(scores.sum(dtype=torch.float64)) for scores in matrices), 1e-300)
    return before / total, after / total


def reallocate(scores: Tensor, n: int, m: int) -> Tensor:
    """A permutation under which every group has its share of the important columns.

    The paper's heuristic channel reallocation: columns in the order of their sums, of equal ones
    the first first, are dealt to the groups in a snake. Sums 1..8 in groups of four come to lie as
    ``[1 4 5 8 | 2 3 6 7]``. It is the same for every ``n``. Raises as `retained` does.
    """
    _check(scores, n, m)
    parts = torch.split(scores, _rows(scores, m))
    sums = torch.stack([part.sum(0, dtype=torch.float64) for part in parts]).sum(0)
    lanes = sums.argsort(stable=True).view(m, -1)
    lanes[1::2] = lanes[1::2].flip(1)
    return lanes.T.flatten()


def gains(scores: Tensor, perm: Tensor, lane: int, n: int, m: int) -> Tensor:
    """(groups, groups) kept score of group g if the k-th column of ``lane`` joined it.

    Of M - 1 columns and one that joins, the N largest are the N - 1 largest of the others and the
    larger of their N-th and the new one, so with t_i the i-th largest of the others of group g

        ``score[g, k] = sum_r t_1[r, g] + ... + t_{N-1}[r, g] + max(t_N[r, g], x[r, k])``.

    In double precision, as sums over a few rows each in the precision of ``scores`` (single if that
    is less). Raises as `retained` does.
    """
    _check(scores, n, m)
    score = torch.zeros(len(perm) // m, 1, dtype=torch.float64, device=scores.device)
    for lanes in _lanes(scores, perm, m):
        joining = lanes.pop(lane)
        *sure, last = largest(lanes, n)
        room = torch.empty_like(joining)  # given back each time, it would cost page faults
        # on a CPU 2.5 times as fast as torch.cdist with p=1, from which max(0, x - t_N) follows,
        # and no small difference of large sums
        kept = [torch.maximum(joining, t, out=room).sum(1) for t in last]
        score = score + torch.stack(kept)
        for t in sure:
            score += t.sum(1, keepdim=True, dtype=torch.float64)
    return score


def linear_sum_assignment(score: Any, maximize: bool) -> tuple[Any, Any]:
    """(rows, columns) of the assignment; scipy's, which takes half a second to import."""
    from scipy.optimize import linear_sum_assignment as solve

    rows, columns = solve(score, maximize=maximize)
    return rows, columns


def assign_lane(scores: Tensor, perm: Tensor, lane: int, n: int, m: int) -> Tensor:
    """``perm`` with the columns of one lane dealt anew to the groups, in the best of all ways.

    A linear sum assignment, solved on the CPU. ``perm`` itself is the answer where nothing is
    better by `retained`, be it for rounding. Raises as `retained` does.
    """
    score = gains(scores, perm, lane, n, m)
    # what a column brings wherever it goes decides nothing; without it scipy takes a tenth of the
    # time, as most columns then want a group that no other wants
    score -= score.mean(0)
    _, order = linear_sum_assignment(score.cpu().numpy(), maximize=True)
    moved = perm.view(-1, m).clone()
    moved[:, lane] = moved[torch.from_numpy(order).to(perm.device), lane]
    return max(perm, moved.flatten(), key=lambda each: retained(scores, n, m, each))


def assign(scores: Tensor, n: int, m: int, perm: Tensor | None = None) -> Tensor:
    """A permutation that keeps at least as much as ``perm``: each lane in turn assigned anew.

    The paper's channel permutation, by default from what `reallocate` gives.

    Raises:
        ValueError: ``perm`` is no permutation of the columns, or as `retained` does.
    """
    perm = reallocate(scores, n, m) if perm is None else perm
    columns = torch.arange(scores.shape[1], device=perm.device)
    if not torch.equal(perm.sort().values, columns):
        raise ValueError(
            f"perm, of {len(perm)} entries, does not hold each of {len(columns)} columns once; "
            "pass a permutation of them or leave it out"
        )
    for lane in range(m):
        perm = assign_lane(scores, perm, lane, n, m)
    return perm


Search = Callable[[Tensor, int, int], Tensor]
SEARCHES: dict[str, Search] = {"reallocate": reallocate, "lsa": assign}


def _rows(scores: Tensor, m: int) -> int:
    """How many rows are examined in one go."""
    piece = IN_CACHE if scores.device.type == "cpu" else ON_GPU
    return max(1, piece * m // scores.shape[1])


def _lanes(scores: Tensor, perm: Tensor, m: int) -> Iterator[list[Tensor]]:
    """The m lanes, (groups, rows) each, for a few rows at a time."""
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    for part in torch.split(scores, _rows(scores, m)):
        columns = part[:, perm].to(dtype).T.contiguous()
        yield list(columns.view(-1, m, len(part)).unbind(1))


def _check(scores: Tensor, n: int, m: int) -> None:
    cols = scores.shape[1]
    if not 1 <= n < m:
        raise ValueError(f"n={n} of m={m} is no pattern; n must be from 1 to m - 1")
    if cols % m:
        raise ValueError(f"m={m} does not divide {cols} columns; choose a divisor of {cols}")
    if bad := count_non_finite(scores):
        raise ValueError(f"scores holds {bad} entries that are NaN or infinite; all must be finite")
