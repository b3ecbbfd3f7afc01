"""The same sparsity in every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prunus.allocators.base import ALLOCATORS, Allocation, Problem, fill


@dataclass(frozen=True)
class Uniform:
    """Every layer at the target, but for those that are sparser than that already."""

    name: ClassVar[str] = "uniform"

    def allocate(self, problem: Problem) -> Allocation:
        share = problem.given
        sizes = [unit.size for unit in problem.units]
        pruned = [unit.pruned for unit in problem.units]
        pairs = zip(sizes, pruned, strict=True)
        total = round(sum(max(share * size, gone) for size, gone in pairs))
        return Allocation(problem.units, fill(sizes, pruned, sizes, total))


ALLOCATORS.add(Uniform.name, Uniform)
