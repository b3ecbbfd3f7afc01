"""One ranking of all layers together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prunus.allocators.base import ALLOCATORS, Allocation, Problem


@dataclass(frozen=True)
class Global:
    """The lowest scores of the whole model go, wherever they are."""

    name: ClassVar[str] = "global"

    def allocate(self, problem: Problem) -> Allocation:
        return Allocation(problem.units, problem.lowest(problem.drop))


ALLOCATORS.add(Global.name, Global)
