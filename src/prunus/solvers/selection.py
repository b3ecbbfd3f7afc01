"""Exact selection on plain tensors: the lowest of all, of each row, of each group."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

CHUNK = 1 << 20  # scores examined in one go: few enough for the cache, many enough to share
FEW = 1 << 16  # up to here, histograms of 65,536 counts cost more than a partial sort

FEW_OF_GROUP = 8  # so many of a larger group are found faster by insertion
SMALL_GROUP = 6  # up to here comparing all pairs of a group beats a partial sort of it

T = TypeVar("T")
AllReduce = Callable[[Tensor], Tensor]


def total(t: Tensor) -> float:
    """The sum, in at least single precision; NaN or infinite if any entry is."""
    half = t.dtype in (torch.float16, torch.bfloat16)
    return float(t.sum(dtype=torch.float32 if half else None))


def total_kept(t: Tensor, keep: Tensor) -> float:
    """The sum of the entries where `keep` is set, in at least single precision.

    Both are of one shape, whichever.
    """
    chunks = zip(_chunks(t), _chunks(keep), strict=True)
    return sum(total(chunk.masked_fill(~kept, 0)) for chunk, kept in chunks)


def count_non_finite(t: Tensor) -> int:
    """NaN and infinite entries; one pass that allocates nothing where there are none."""
    if math.isfinite(total(t)):
        return 0
    return sum(int((~chunk.isfinite()).sum()) for chunk in _chunks(t))


def _flip(keys: Tensor) -> Tensor:
    """Float bits to integers of the same order, and back: it is its own inverse."""
    info = torch.iinfo(keys.dtype)
    sign = keys >> (info.bits - 1)  # all ones where negative; torch.where takes six times as long
    return sign.bitwise_and_(info.max).bitwise_xor_(keys)


def _keys(scores: Tensor) -> Tensor:
    ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}[scores.element_size()]
    # adding zero turns -0.0 into 0.0, which is equal and must tie
    keys = _flip((scores + 0.0).view(ints))
    return keys.int() if ints == torch.int16 else keys


def _chunks(scores: Tensor) -> Sequence[Tensor]:
    return torch.split(scores.reshape(-1), CHUNK)


def _histogram(scores: Sequence[Tensor], prefix: int | None, shift: int) -> Tensor:
    """(65536,) counts of the 16 key bits from `shift` up, of keys that begin with `prefix`."""
    counts = torch.zeros(1 << 16, dtype=torch.int64, device=scores[0].device)
    for chunk in itertools.chain.from_iterable(map(_chunks, scores)):
        keys = _keys(chunk)
        if prefix is None:
            digits = (keys >> shift) + (1 << 15)  # the top digit carries the sign
        else:
            digits = (keys[keys >> (shift + 16) == prefix] >> shift) & 0xFFFF
        counts += torch.bincount(digits, minlength=1 << 16).to(counts.device)
    return counts


def kth_lowest(scores: Sequence[Tensor], k: int, all_reduce: AllReduce | None = None) -> float:
    """The k-th lowest value (k from 1) of all entries, by a radix search over histograms.

    Reads fp32 scores twice and copies nothing; over ranks, only 65,536 counts travel for each
    16 bits. ``scores`` may have any shapes, have one floating dtype, and may hold infinities but
    no NaN; ``all_reduce`` sums a tensor over the ranks that hold the other scores.
    """
    bits = 8 * scores[0].element_size()
    prefix, rest = None, k
    for shift in range(bits - 16, -1, -16):
        counts = _histogram(scores, prefix, shift)
        below = (counts if all_reduce is None else all_reduce(counts)).cumsum(0)
        digit = int(torch.searchsorted(below, rest))
        rest -= int(below[digit - 1]) if digit else 0
        prefix = digit - (1 << 15) if prefix is None else (prefix << 16) | digit
    ints = {16: torch.int16, 32: torch.int32, 64: torch.int64}[bits]
    return float(_flip(torch.tensor([prefix], dtype=ints)).view(scores[0].dtype))


def _below_and_equal(scores: Tensor, threshold: float) -> tuple[int, int]:
    below = sum(int(torch.count_nonzero(chunk < threshold)) for chunk in _chunks(scores))
    equal = sum(int(torch.count_nonzero(chunk == threshold)) for chunk in _chunks(scores))
    return below, equal


def count_lowest(
    scores: Sequence[Tensor],
    k: int,
    all_reduce: AllReduce | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[list[int], list[int]]:
    """How many of the k lowest entries lie in each tensor: here, and on all ranks together.

    ``scores`` may have any shapes, have one floating dtype, and may hold infinities but no NaN; k
    counts those of all ranks, of which this is number ``rank`` of ``world_size``. Both lists have
    an entry for each tensor.

    Ties go to the first tensor, and within a tensor to the first rank, so that tensors cut into
    consecutive pieces over ranks give what the whole tensors would.
    """
    if k == 0:
        return [0] * len(scores), [0] * len(scores)
    threshold = kth_lowest(scores, k, all_reduce)
    counts = torch.tensor([_below_and_equal(tensor, threshold) for tensor in scores])
    everyone = torch.zeros(world_size, len(scores), 2, dtype=torch.int64)
    everyone[rank] = counts
    if all_reduce is not None:
        everyone = all_reduce(everyone)
    ties = everyone[:, :, 1].T.reshape(-1)  # tensor by tensor, rank by rank
    left = k - int(everyone[:, :, 0].sum())
    before = ties.cumsum(0) - ties
    taken = (left - before).clamp(min=0).minimum(ties).reshape(len(scores), world_size)
    counts = everyone[:, :, 0].T + taken
    return counts[:, rank].tolist(), counts.sum(1).tolist()


def keep_all_but_lowest(scores: Tensor, k: int) -> Tensor:
    """The keep-mask that drops exactly the k lowest entries; of equal ones the first go.

    ``scores`` has any shape, which the mask takes; 0 <= k <= numel; no NaN.
    """
    if k == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    if k == scores.numel():
        return torch.zeros_like(scores, dtype=torch.bool)
    few = scores.numel() <= FEW
    flat = scores.T if scores.dim() == 2 and scores.T.is_contiguous() else scores
    threshold = float(flat.reshape(-1).kthvalue(k).values) if few else kth_lowest([flat], k)
    keep = scores > threshold
    surplus = keep.numel() - int(torch.count_nonzero(keep)) - k  # ties that must stay
    if surplus:
        keep = keep.contiguous()  # scores may be transposed
        ties = (scores == threshold).reshape(-1).nonzero().squeeze(1)
        keep.view(-1)[ties[ties.numel() - surplus :]] = True
    return keep


def keep_all_but_lowest_of_rows(scores: Tensor, k: int) -> Tensor:
    """The keep-mask that drops exactly the k lowest of each row; of equal ones the first go.

    ``scores`` and the mask are (rows, cols), 0 <= k <= cols. Works on chunks of rows, because
    `kthvalue` copies its input.
    """
    cols = scores.shape[1]
    keep = torch.ones_like(scores, dtype=torch.bool)
    if k == 0 or scores.numel() == 0:
        return keep
    step = max(1, CHUNK // cols)
    for part, out in zip(torch.split(scores, step), torch.split(keep, step), strict=True):
        threshold = part.kthvalue(k, dim=1, keepdim=True).values
        torch.gt(part, threshold, out=out)
        _keep_last_of_ties(part, threshold, out, cols - k)
    return keep


def _keep_last_of_ties(part: Tensor, threshold: Tensor, keep: Tensor, kept: int) -> None:
    """Add the last entries of each row that equal its threshold, until `kept` of it are kept.

    ``part`` and ``keep``, which is changed, are (rows, cols), ``threshold`` (rows, 1).
    """
    surplus = kept - keep.sum(1, keepdim=True, dtype=torch.int32)
    if surplus.any():
        ties = part == threshold
        from_here_on = ties.flip(1).cumsum(1).flip(1)
        keep |= ties & (from_here_on <= surplus)


def keep_highest_of_groups(scores: Tensor, n: int, m: int) -> Tensor:
    """Keep the n highest of every m consecutive columns; of equal ones the first go.

    ``scores`` and the mask are (rows, cols), m divides cols and 0 < n < m.
    """
    if scores.is_cuda and m > 4:  # a kernel or two, and nothing that waits for the device
        groups = scores.reshape(-1, m)
        drop = torch.full((len(groups),), m - n, device=scores.device)
        return keep_all_but_lowest_of_each(groups, drop).reshape(scores.shape)
    if m > SMALL_GROUP:
        groups = scores.reshape(-1, m)
        few = min(n, m - n) <= FEW_OF_GROUP
        keep = _few_of_groups(groups, n) if few else keep_all_but_lowest_of_rows(groups, m - n)
        return keep.reshape(scores.shape)
    keep = torch.empty_like(scores, dtype=torch.bool)
    shape = len(scores), scores.shape[1] // m, m  # there may be no rows
    for lane, count in enumerate(_higher(scores.reshape(shape).unbind(2))):
        torch.lt(count, n, out=keep.view(shape)[:, :, lane])
    return keep


def _few_of_groups(groups: Tensor, n: int) -> Tensor:
    """The n highest of each row, where they are few, or all but few: 4 to 10 times `kthvalue`.

    ``groups`` and the mask are (groups, m).
    """
    parts = torch.split(groups, max(1, CHUNK // groups.shape[1]))
    return torch.cat([_few_of_some_groups(part, n) for part in parts])


def _few_of_some_groups(groups: Tensor, n: int) -> Tensor:
    drop, lanes = groups.shape[1] - n, groups.T.contiguous().unbind(0)
    if n <= drop:  # the lowest that stays
        threshold = largest(lanes, n)[-1].unsqueeze(1)
        keep = groups >= threshold
    else:  # the highest that goes
        threshold = largest(lanes, drop, torch.minimum, torch.maximum)[-1].unsqueeze(1)
        keep = groups > threshold
    if int(keep.count_nonzero()) != n * len(groups):
        torch.gt(groups, threshold, out=keep)
        _keep_last_of_ties(groups, threshold, keep, n)
    return keep


def largest(
    lanes: Iterable[T],
    n: int,
    maximum: Callable[[T, T], T] = torch.maximum,  # type: ignore[assignment]
    minimum: Callable[[T, T], T] = torch.minimum,  # type: ignore[assignment]
) -> list[T]:
    """The n largest of some tensors of one shape, entry by entry, the largest first.

    By insertion: `torch.topk` over a handful of entries takes 25 times as long. With numpy's two
    functions it takes numpy's arrays.
    """
    best: list[T] = []
    for lane in lanes:
        for i, held in enumerate(best):
            best[i], lane = maximum(held, lane), minimum(held, lane)
        if len(best) < n:
            best.append(lane)
    return best


def _higher(lanes: Sequence[Tensor]) -> list[Tensor]:
    """For each entry of a group how many others are higher, a later one of equal ones being so.

    ``lanes`` are m tensors, (rows, groups) each, as are the counts.
    """
    counts = [torch.full_like(lane, i, dtype=torch.uint8) for i, lane in enumerate(lanes)]
    for i, j in itertools.combinations(range(len(lanes)), 2):
        later = (lanes[j] >= lanes[i]).view(torch.uint8)
        counts[i] += later
        counts[j] -= later
    return counts


def keep_all_but_lowest_of_each(scores: Tensor, counts: Tensor) -> Tensor:
    """The same with another count for each row; of equal ones the first go.

    ``scores`` and the mask are (rows, cols), ``counts`` is (rows,).

    Slower than a single count for all rows, because it sorts.
    """
    order = scores.argsort(dim=1, stable=True)
    places = torch.arange(scores.shape[1], device=scores.device)
    keep = places >= counts.to(scores.device).unsqueeze(1)
    return torch.empty_like(keep).scatter_(1, order, keep)
