"""What every statistic has in common."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from prunus.core.ranks import all_ranks
from prunus.stats.block_fisher import Sampling


@runtime_checkable
class Statistic(Protocol):
    """Something summed over calibration data for one layer.

    A sum, so that data-parallel ranks add up: `tensors` are what one all-reduce makes whole.
    """

    reads: Literal["inputs", "gradients"]
    """what `update` takes in"""
    by_rows: bool
    """whether each row of the layer has numbers of its own, so that rows can be shared out"""

    def update(self, t: Tensor) -> None:
        """Take in inputs as (samples, columns), or gradients as (samples, rows, columns).

        Columns are those of the layer's matrix.
        """
        ...

    def tensors(self) -> list[Tensor]: ...

    @property
    def nbytes(self) -> int:
        """Bytes it holds, known before any data has been seen."""
        ...


@runtime_checkable
class GradientStatistic(Statistic, Protocol):
    """One that reads gradients."""

    sampling: Sampling


@runtime_checkable
class RowStatistic(GradientStatistic, Protocol):
    """One whose rows can be measured apart from each other."""

    def with_rows(self, rows: int) -> RowStatistic:
        """An empty one with the same settings for another number of rows."""
        ...


def all_reduce_statistics(stats: Iterable[Statistic]) -> None:
    """Add statistics up over all data-parallel ranks, in place; shared ones once."""
    everyone = all_ranks()
    for stat in {id(stat): stat for stat in stats}.values() if everyone.group is not None else ():
        for tensor in stat.tensors():
            tensor.copy_(everyone.all_reduce(tensor))
