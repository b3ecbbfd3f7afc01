"""Which tensors share memory: as one weight in another order, or in part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, chain

import torch
from torch import Tensor, nn

from prunus.core.masks import local

Places = tuple[tuple[int, int], ...]


def places(t: Tensor) -> Places:
    """(stride, size) of the memory that a tensor takes; the same for views of all of it.

    A weight and its transpose take the same places, and so does it in another shape.

    >>> w = torch.zeros(3, 4)
    >>> places(w), places(w.t()) == places(w.view(2, 6)) == places(w), places(w[:, :2])
    (((1, 12),), True, ((4, 3), (1, 2)))
    """
    dims = sorted(
        ((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size != 1),
        reverse=True,
    )
    merged: list[tuple[int, int]] = []
    for stride, size in dims:
        if merged and merged[-1][0] == stride * size:
            merged[-1] = stride, merged[-1][1] * size
        else:
            merged.append((stride, size))
    return tuple(merged)


def shares_with_itself(t: Tensor) -> bool:
    """Whether one place in memory stands for several entries, as in what was expanded."""
    taken = 1
    for stride, size in reversed(places(t)):
        if stride < taken:
            return True
        taken = stride * (size - 1) + taken
    return False


def _span(t: Tensor) -> tuple[int, int]:
    """The first byte and the one after the last."""
    last = sum(stride * (size - 1) for stride, size in places(t))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def _offsets(t: Tensor) -> Tensor:
    """Where its entries begin, in bytes from address 0."""
    offsets = torch.zeros(1, dtype=torch.int64)
    for stride, size in places(t):
        offsets = (offsets.unsqueeze(1) + torch.arange(size) * stride).flatten()
    return offsets * t.element_size() + t.data_ptr()


def _is_one_run(t: Tensor) -> bool:
    """Whether there is nothing between its entries."""
    return all(stride == 1 for stride, _ in places(t))


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors share some of their memory and not all of it.

    >>> w = torch.zeros(4, 4)
    >>> overlap(w[:3], w[2:]), overlap(w[:2], w[2:]), overlap(w[:, :2], w[:, 2:]), overlap(w, w.t())
    (True, False, False, False)
    """
    (first, end), (other_first, other_end) = _span(a), _span(b)
    apart = end <= other_first or other_end <= first
    same = first == other_first and places(a) == places(b) and a.dtype == b.dtype
    if apart or same or a.device != b.device:
        return False
    if a.dtype != b.dtype or (_is_one_run(a) and _is_one_run(b)):
        return True
    return bool(torch.isin(_offsets(a), _offsets(b)).any())


def overlapping(tensors: Mapping[str, Tensor], names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Pairs of a tensor of these names and another one, which share a part of their memory."""
    spans = sorted((*_span(t), name) for name, t in tensors.items() if t.numel() and t.data_ptr())
    furthest = [0, *accumulate((end for _, end, _ in spans), max)]
    wanted = set(names)
    for i, (begin, _, name) in enumerate(spans):
        for j in range(i - 1, -1, -1):
            if furthest[j + 1] <= begin:
                break  # nothing before it reaches as far
            other = spans[j][2]
            if {name, other} & wanted and overlap(tensors[name], tensors[other]):
                yield (name, other) if name in wanted else (other, name)


def storage_of(weight: nn.Parameter) -> tuple[int, ...]:
    """What tied weights have in common: one Parameter, or views of one memory, in any order."""
    if nn.parameter.is_lazy(weight):
        return (id(weight),)
    part = local(weight.detach())
    pointer = part.data_ptr()  # meta and empty: no memory
    return (pointer, *chain(*places(part))) if pointer else (id(weight),)
