"""Neighbours of points: ball query, k nearest, and farthest point sampling.

PointAcc (Lin et al., MICRO 2021, https://arxiv.org/abs/2110.07600) ranks points with the sorter
that also makes its kernel maps. Here points are sorted by the cell of a grid that they lie in; a
line of three cells is one range of sorted keys, found by two binary searches, so that a query looks
at 3^(D-1) ranges and ranks what they hold.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from prunus.spatial.keys import Grid

_SLACK = 1 + 1e-6  # cells are a little wider than the radius, so that rounding loses no neighbour
NOTHING = -1
_QUERIES = 1 << 14  # at a time, for the memory of their candidates


def ball_query(points: Tensor, queries: Tensor, radius: float, count: int) -> Tensor:
    """(M, count) the nearest points within the radius of each query, nearest first, then -1.

    ``points`` is (N, D), ``queries`` (M, D).
    """
    _check(points, queries, count)
    if not radius > 0:
        raise ValueError(f"radius={radius}; use more than 0")
    if not len(points) or not len(queries):
        return torch.full((len(queries), count), NOTHING, device=points.device)
    cells = _Cells(points, radius * _SLACK)
    found = []
    for part in torch.split(queries, _QUERIES):
        query, point, square = cells.candidates(part)
        near = square <= radius * radius
        found.append(_rank(query[near], point[near], square[near], len(part), count))
    return torch.cat(found)


def nearest_neighbours(points: Tensor, queries: Tensor, k: int) -> Tensor:
    """(M, k) the k nearest points of each query, nearest first.

    Cells begin at a size that holds about k points, and grow for the queries that found too few.
    """
    _check(points, queries, k)
    if k > len(points):
        raise ValueError(f"k={k} of {len(points)} points; use at most {len(points)}")
    spread = float((points.amax(0) - points.amin(0)).mean())
    smallest = 1e-6 * float(torch.cat([points, queries]).abs().amax()) if len(queries) else 0.0
    radius = max(spread * (k / len(points)) ** (1 / points.shape[1]), smallest, 1e-12)
    result = torch.full((len(queries), k), NOTHING, device=points.device)
    open_ = torch.arange(len(queries), device=points.device)
    while len(open_):
        found = ball_query(points, queries[open_], radius, k)
        done = found[:, -1] != NOTHING
        result[open_[done]] = found[done]
        open_, radius = open_[~done], 2 * radius
    return result


def farthest_point_sampling(points: Tensor, count: int, start: int = 0) -> Tensor:
    """(count,) points of which each is the farthest from all before it; the first is `start`.

    One pass over all points for each sample: the choice depends on all before it.
    """
    if not 1 <= count <= len(points):
        raise ValueError(f"count={count} of {len(points)} points; use 1 to {len(points)}")
    chosen = torch.empty(count, dtype=torch.int64, device=points.device)
    square = torch.full((len(points),), torch.inf, dtype=points.dtype, device=points.device)
    latest = torch.tensor(start, device=points.device)
    for i in range(count):
        chosen[i] = latest
        distance = (points - points[latest]).square_().sum(1)
        square = torch.minimum(square, distance)
        latest = square.argmax()
    return chosen


def _check(points: Tensor, queries: Tensor, count: int) -> None:
    if points.dim() != 2 or queries.dim() != 2 or points.shape[1] != queries.shape[1]:
        raise ValueError(
            f"points {tuple(points.shape)} and queries {tuple(queries.shape)}; use (N, D) and "
            "(M, D)"
        )
    if count < 1:
        raise ValueError(f"count={count}; use at least 1")


class _Cells:
    """Points sorted by the cells of a grid."""

    def __init__(self, points: Tensor, cell: float) -> None:
        self.points, self.cell = points, cell
        self.low = points.amin(0).double()
        cells = ((points.double() - self.low) / cell).floor().long()
        self.shape = tuple((cells.amax(0) + 1).tolist())
        self.grid = Grid(self.shape, (2,) * len(self.shape))
        self.keys, self.order = torch.sort(_keys(self.grid, cells))

    def candidates(self, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(query, point, squared distance) of all points in the cells around each query's own."""
        begin, end = self._ranges(queries)
        lengths = end - begin
        which = torch.repeat_interleave(torch.arange(len(begin), device=begin.device), lengths)
        before = torch.cumsum(lengths, 0) - lengths
        place = torch.arange(len(which), device=which.device) - before[which] + begin[which]
        query = which // (len(begin) // len(queries))
        point = self.order[place]
        return query, point, (self.points[point] - queries[query]).square().sum(1)

    def _ranges(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Begin and end, in sorted order, of each query's lines of three cells."""
        own = ((queries.double() - self.low) / self.cell).floor()
        bounds = torch.tensor(self.shape, device=own.device)
        own = torch.minimum(own.clamp_(min=-1), bounds).long()  # farther out there is nothing
        middle = _keys(self.grid, own)
        lines = itertools.product((-1, 0, 1), repeat=len(self.shape) - 1)
        shifts = [self.grid.shift((*line, 0)) for line in lines]
        begins = [torch.searchsorted(self.keys, middle + (s - 1)) for s in shifts]
        ends = [torch.searchsorted(self.keys, middle + (s + 1), right=True) for s in shifts]
        return torch.stack(begins, 1).flatten(), torch.stack(ends, 1).flatten()


def _keys(grid: Grid, cells: Tensor) -> Tensor:
    return grid.keys(torch.cat([torch.zeros_like(cells[:, :1]), cells], 1), 1)


def _rank(query: Tensor, point: Tensor, square: Tensor, queries: int, count: int) -> Tensor:
    """(queries, count) each query's points in the order of distance, filled up with -1."""
    order = torch.argsort(square, stable=True)
    order = order[torch.argsort(query[order], stable=True)]
    query, point = query[order], point[order]
    found = torch.bincount(query, minlength=queries)
    before = torch.cumsum(found, 0) - found
    rank = torch.arange(len(query), device=query.device) - before[query]
    result = torch.full((queries, count), NOTHING, device=query.device)
    kept = rank < count
    result[query[kept], rank[kept]] = point[kept]
    return result
