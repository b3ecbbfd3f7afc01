"""The same sparsity in every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prunus.allocators.base import ALLOCATORS, Allocation, Problem, fill


@dataclass(frozen=True)
class Uniform:
    """Every layer at the target; a layer already sparser than that spares the others the rest."""

    name: ClassVar[str] = "uniform"

    def allocate(self, problem: Problem) -> Allocation:
        sizes = [unit.size for unit in problem.units]
        pruned = [unit.pruned for unit in problem.units]
        return Allocation(problem.units, fill(sizes, pruned, sizes, problem.drop))


ALLOCATORS.add(Uniform.name, Uniform)
