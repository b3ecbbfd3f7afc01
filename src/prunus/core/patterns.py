"""What a mask may look like.

A pattern sees one layer as a matrix of scores, (out, inputs), in which the input channels are
innermost, so that groups of columns are groups of input channels. It cuts the matrix into units
that live or die together and counts them exactly: ``round(sparsity * units)`` go, no more, no less;
of equal scores the first goes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from prunus.core.names import did_you_mean
from prunus.solvers.selection import (
    keep_all_but_lowest,
    keep_all_but_lowest_of_rows,
    keep_highest_of_groups,
)


class Pattern(Protocol):
    """``kind`` is what pruners list as supported; ``fixed`` the sparsity a pattern implies.

    >>> from prunus.core.patterns import parse_pattern
    >>> pattern = parse_pattern("2:4")
    >>> pattern.kind, pattern.fixed
    ('N:M', 0.5)
    >>> pattern.mask(torch.tensor([[0.1, 0.4, 0.3, 0.2]]), drop=0)
    tensor([[False,  True,  True, False]])
    """

    @property
    def kind(self) -> str: ...
    @property
    def fixed(self) -> float | None: ...
    def check(self, rows: int, cols: int, channels: int) -> None:
        """Raises ValueError if the pattern does not fit a (rows, cols) layer."""
        ...

    def pool(self, scores: Tensor) -> Tensor:
        """(rows, cols) scores -> the scores of the units; booleans -> whether any is set."""
        ...

    def mask(self, units: Tensor, drop: int) -> Tensor:
        """Pooled scores -> (rows, cols) keep-mask that drops `drop` units."""
        ...


class _SingleWeights:
    """What patterns share whose units are single weights of any layer."""

    fixed = None

    def check(self, rows: int, cols: int, channels: int) -> None:
        pass

    def pool(self, scores: Tensor) -> Tensor:
        return scores


@dataclass(frozen=True)
class Unstructured(_SingleWeights):
    """Any weight may go."""

    kind = "unstructured"

    def mask(self, units: Tensor, drop: int) -> Tensor:
        return keep_all_but_lowest(units, drop)

    def __str__(self) -> str:
        return "unstructured"


@dataclass(frozen=True)
class Row(_SingleWeights):
    """Every output keeps the same number of inputs; where that does not divide, the first
    outputs lose one more."""

    kind = "row"

    def mask(self, units: Tensor, drop: int) -> Tensor:
        each, more = divmod(drop, max(1, len(units)))
        first = keep_all_but_lowest_of_rows(units[:more], each + 1)
        return torch.cat([first, keep_all_but_lowest_of_rows(units[more:], each)])

    def __str__(self) -> str:
        return "row"


@dataclass(frozen=True)
class NM:
    """N of every M consecutive input channels are kept (Zhou et al., "Learning N:M", 2021)."""

    n: int
    m: int
    kind = "N:M"

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise ValueError(f"pattern '{self}' keeps N of M weights; 0 < N < M is needed")

    @property
    def fixed(self) -> float:
        return 1 - self.n / self.m

    def check(self, rows: int, cols: int, channels: int) -> None:
        if channels % self.m:
            near = [str(NM(self.n, m)) for m in range(self.n + 1, 33) if channels % m == 0]
            remedy = f"use {' or '.join(near[:2])}, or exclude it" if near else "exclude it"
            raise ValueError(f"pattern {self} does not divide {channels} input channels; {remedy}")

    def pool(self, scores: Tensor) -> Tensor:
        return scores

    def mask(self, units: Tensor, drop: int) -> Tensor:
        return keep_highest_of_groups(units, self.n, self.m)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class NMAlongOutputs:
    """N of every M consecutive outputs are kept for each input: N:M of the transposed matrix."""

    n: int
    m: int
    kind = "N:M along outputs"

    def __post_init__(self) -> None:
        NM(self.n, self.m)

    @property
    def fixed(self) -> float:
        return 1 - self.n / self.m

    def check(self, rows: int, cols: int, channels: int) -> None:
        if rows % self.m:
            raise ValueError(
                f"pattern {self} does not divide {rows} outputs; use an M that does, or exclude it"
            )

    def pool(self, scores: Tensor) -> Tensor:
        return scores

    def mask(self, units: Tensor, drop: int) -> Tensor:
        return keep_highest_of_groups(units.T.contiguous(), self.n, self.m).T.contiguous()

    def __str__(self) -> str:
        return f"{self.n}:{self.m} along outputs"


@dataclass(frozen=True)
class Block:
    """Blocks of weights go together; ``4x1`` is four outputs of one input channel."""

    rows: int
    cols: int
    kind = "block"
    fixed = None

    def __post_init__(self) -> None:
        if min(self.rows, self.cols) < 1 or self.rows * self.cols == 1:
            raise ValueError(f"pattern '{self}' is no block; write '4x1', '1x4' or '8x8'")

    def check(self, rows: int, cols: int, channels: int) -> None:
        if rows % self.rows or channels % self.cols:
            raise ValueError(
                f"block {self} does not divide {rows} outputs x {channels} input channels; "
                "use a block that does, or exclude the layer"
            )

    def pool(self, scores: Tensor) -> Tensor:
        rows, cols = scores.shape
        blocks = scores.reshape(rows // self.rows, self.rows, cols // self.cols, self.cols)
        if scores.dtype == torch.bool:  # a sum would count in int64
            return blocks.view(torch.uint8).amax(dim=(1, 3)).bool()
        half = scores.dtype in (torch.float16, torch.bfloat16)  # would overflow, and tie
        return blocks.sum(dim=(1, 3), dtype=torch.float32 if half else None)

    def mask(self, units: Tensor, drop: int) -> Tensor:
        keep = keep_all_but_lowest(units, drop)
        blocks = keep[:, None, :, None].expand(-1, self.rows, -1, self.cols)
        # a view of a single row of blocks would show each entry several times
        return blocks.reshape(self.rows * keep.shape[0], self.cols * keep.shape[1]).contiguous()

    def __str__(self) -> str:
        return f"{self.rows}x{self.cols}"


def parse_pattern(text: str) -> Pattern:
    """``unstructured``, ``row``, ``2:4`` (N kept of every M) or ``4x1`` (rows x columns).

    ``2:4`` groups consecutive inputs; ``2:4 along outputs`` groups outputs. Raises ValueError for
    anything else.
    """
    text = str(text).strip()
    if match := re.fullmatch(r"(\d+):(\d+)(?:\s+along\s+(inputs|outputs))?", text):
        kind = NMAlongOutputs if match[3] == "outputs" else NM
        return kind(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"(\d+)x(\d+)", text):
        return Block(int(match[1]), int(match[2]))
    plain: dict[str, Pattern] = {"unstructured": Unstructured(), "row": Row()}
    if text not in plain:
        hint = did_you_mean(text, [*plain, "2:4", "4x1"])
        raise ValueError(f"unknown pattern {text!r}{hint}")
    return plain[text]
