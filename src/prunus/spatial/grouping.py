"""Adaptive grouping: offsets of about the same size are padded and multiplied in one batch.

Tang et al., "TorchSparse: Efficient Point Cloud Inference Engine", MLSys 2022,
https://arxiv.org/abs/2204.10319, section 4.1. One batched product for many small ones saves the
launching of kernels on a GPU; a CPU has nothing to save there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """Offsets that are multiplied together."""

    offsets: tuple[int, ...]
    size: int
    """pairs of the largest, to which the others are padded"""
    batched: bool
    """one batched product; else one product for each offset, without padding"""


def plan_groups(sizes: Sequence[int], epsilon: float = 0.3, threshold: int = 20_000) -> list[Group]:
    """Which offsets to multiply together; offsets without pairs are left out.

    Offsets are taken from both ends inwards, since in a submanifold map opposite ones are of the
    same size. A group is closed when its smallest would be less than ``1 - epsilon`` of its
    largest; it is batched if that has fewer than ``threshold`` pairs.
    """
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon={epsilon}; use 0 to 1, the share of padding to allow")
    count = len(sizes)
    inwards = sorted(range(count), key=lambda i: (min(i, count - 1 - i), i))
    groups: list[list[int]] = []
    for offset in inwards:
        if not sizes[offset]:
            continue
        together = [sizes[o] for o in groups[-1]] if groups else []
        together.append(sizes[offset])
        if groups and 1 - min(together) / max(together) <= epsilon:
            groups[-1].append(offset)
        else:
            groups.append([offset])
    return [_group(group, sizes, threshold) for group in groups]


def _group(offsets: list[int], sizes: Sequence[int], threshold: int) -> Group:
    size = max(sizes[o] for o in offsets)
    return Group(tuple(offsets), size, len(offsets) > 1 and size < threshold)


def padding_share(groups: Sequence[Group], sizes: Sequence[int]) -> float:
    """Share of the rows multiplied that are padding."""
    real = sum(sizes[o] for group in groups for o in group.offsets)
    rows = sum(
        group.size * len(group.offsets) if group.batched else sum(sizes[o] for o in group.offsets)
        for group in groups
    )
    return 1 - real / rows if rows else 0.0
