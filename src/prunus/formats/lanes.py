"""How EIE walks a matrix: rows dealt out to lanes, and each lane's values column by column.

Lane p of P (a processing element) owns the rows p, p + P, p + 2P, ... A value is stored with the
number of zeros before it, in k bits; a longer run takes virtual zeros, each of which stands for
2^k - 1 zeros and one more. Zeros are counted from the top of each column (``reset="column"``, as in
figure 3 of Han et al., "EIE", 2016, https://arxiv.org/abs/1602.01528, and in the authors' encoder)
or through the lane's columns without a break (``reset="stream"``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from prunus.formats.base import Mask

Reset = Literal["column", "stream"]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Walk:
    """The values of a matrix in the order in which its lanes store them."""

    lanes: int
    rows: int
    columns: int
    lane_columns: Ints
    """lane * columns + column of each value"""
    local_rows: Ints
    """row // lanes of each value"""

    @classmethod
    def of(cls, mask: Mask, lanes: int) -> Walk:
        """The walk over a (rows, columns) mask."""
        if lanes < 1:
            raise ValueError(f"elements={lanes}; use at least 1")
        rows, columns = mask.shape
        depth = -(-rows // lanes)
        padded = mask
        if rows % lanes:
            padded = np.zeros((depth * lanes, columns), np.bool_)
            padded[:rows] = mask
        # (lanes, columns, local rows): memory order is then the order of the walk
        by_lane = padded.reshape(depth, lanes, columns).transpose(1, 2, 0)
        flat = np.flatnonzero(np.ascontiguousarray(by_lane))
        lane_columns, local_rows = np.divmod(flat, max(1, depth))
        return cls(lanes, rows, columns, lane_columns, local_rows)

    @property
    def flat(self) -> Ints:
        """Where each value lies in the (rows, columns) matrix."""
        lane, column = np.divmod(self.lane_columns, max(1, self.columns))
        result: Ints = (self.local_rows * self.lanes + lane) * self.columns + column
        return result

    def depths(self) -> Ints:
        """(lanes,) rows of each lane."""
        result: Ints = (self.rows - np.arange(self.lanes) + self.lanes - 1) // self.lanes
        return result

    def zeros_before(self, reset: Reset) -> Ints:
        """Zeros between each value and the one before it, in its column or in its lane."""
        if reset == "column":
            groups, places = self.lane_columns, self.local_rows
        elif reset == "stream":
            groups, column = np.divmod(self.lane_columns, max(1, self.columns))
            places = column * self.depths()[groups] + self.local_rows
        else:
            raise ValueError(f"reset={reset!r}; use 'column' or 'stream'")
        gaps: Ints = places.copy()
        same = groups[1:] == groups[:-1]
        gaps[1:][same] -= places[:-1][same] + 1
        return gaps


def entry_counts(
    mask: Mask, lanes: int, index_bits: int = 4, reset: Reset = "column"
) -> npt.NDArray[np.int64]:
    """(lanes, columns) entries that each lane stores for each column, virtual zeros included.

    A virtual zero belongs to the column in which it falls.
    """
    walk = Walk.of(mask, lanes)
    padding = walk.zeros_before(reset) >> index_bits
    counts = np.bincount(walk.lane_columns, minlength=lanes * mask.shape[1])
    owners = virtual_zero_columns(walk, padding, index_bits, reset)
    counts += np.bincount(owners, minlength=len(counts))
    return counts.reshape(lanes, -1)


def virtual_zero_columns(walk: Walk, padding: Ints, index_bits: int, reset: Reset) -> Ints:
    """lane * columns + column of each virtual zero, value after value."""
    owners = np.repeat(walk.lane_columns, padding)
    if reset == "column" or not len(owners):
        return owners
    lane, column = np.divmod(walk.lane_columns, walk.columns)
    depth = walk.depths()[lane]
    zeros = walk.zeros_before(reset)
    begin = column * depth + walk.local_rows - zeros  # the place of the first of the zeros
    nth = np.arange(len(owners)) - np.repeat(np.cumsum(padding) - padding, padding)
    places = np.repeat(begin, padding) + ((nth + 1) << index_bits) - 1
    result: Ints = np.repeat(lane, padding) * walk.columns + places // np.repeat(depth, padding)
    return result


def expected_entries(rows: int, density: float, index_bits: int = 4) -> float:
    """Entries of one column of a lane of so many rows, where every weight is there or not alike.

    ``d (R + sum over m of q^(J m) max(0, R - J m))`` with J = 2^k and q = 1 - d.
    """
    jump = 1 << index_bits
    runs = range(jump, rows, jump)
    return density * (rows + sum((1 - density) ** run * (rows - run) for run in runs))
