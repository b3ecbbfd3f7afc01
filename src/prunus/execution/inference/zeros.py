"""What pattern the zeros of a weight have, as far as it matters to how the weight can be run."""

from __future__ import annotations

from torch import Tensor

from prunus.core.masks import countable
from prunus.core.patterns import Block

GROUPS = (4, 8, 16, 2, 32)
BLOCKS = ((32, 32), (16, 16), (8, 8), (4, 4), (4, 1), (1, 4), (8, 1), (1, 8))
FULL = 0.98  # what share of the zeros a pattern has to explain, or of its places to use


def is_nm(matrix: Tensor, n: int, m: int) -> bool:
    """Whether no m consecutive columns of a row hold more than n weights that are not zero."""
    rows, cols = matrix.shape
    if cols % m:
        return False
    return int((matrix != 0).reshape(rows, cols // m, m).sum(-1).max()) <= n


def kept_blocks(matrix: Tensor, rows: int, cols: int) -> float:
    """Share of the blocks that are not all zero; 1 where blocks of this shape do not divide it."""
    if matrix.shape[0] % rows or matrix.shape[1] % cols:
        return 1.0
    kept = Block(rows, cols).pool(matrix != 0)
    return float(kept.float().mean())


def pattern_of(matrix: Tensor) -> str:
    """``dense``, such as ``16x16`` or ``2:4``, or ``unstructured``, of a (rows, cols) weight.

    Blocks first, the largest of which the zeros are made up; then the shortest groups of columns in
    all of which the same number is kept. A few kept weights may be zero by chance.
    """
    matrix = countable(matrix)
    share = int(matrix.count_nonzero()) / max(1, matrix.numel())
    if share == 1:
        return "dense"
    for rows, cols in BLOCKS:
        if 1 - kept_blocks(matrix, rows, cols) >= FULL * (1 - share):
            return f"{rows}x{cols}"
    for m in GROUPS:
        n = round(share * m)
        if 0 < n < m and FULL * n / m <= share and is_nm(matrix, n, m):
            return f"{n}:{m}"
    return "unstructured"
