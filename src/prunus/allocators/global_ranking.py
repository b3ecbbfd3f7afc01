"""One ranking of all layers together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prunus.allocators.base import Allocation, Allocator, Problem, register_allocator


@register_allocator
@dataclass(frozen=True)
class Global(Allocator):
    """The lowest scores of the whole model go, wherever they are."""

    name: ClassVar[str] = "global"
    ranks_scores: ClassVar[bool] = True

    def allocate(self, problem: Problem) -> Allocation:
        return Allocation(problem.units, problem.lowest(problem.drop))
