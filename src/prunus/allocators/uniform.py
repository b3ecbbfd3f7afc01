"""The same sparsity in every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prunus.allocators.base import ALLOCATORS, Allocation, Problem, filled


@dataclass(frozen=True)
class Uniform:
    """Every layer at the target; a layer already sparser than that spares the others the rest."""

    name: ClassVar[str] = "uniform"

    def allocate(self, problem: Problem) -> Allocation:
        return filled(problem, [1.0] * len(problem.units))


ALLOCATORS.add(Uniform.name, Uniform)
