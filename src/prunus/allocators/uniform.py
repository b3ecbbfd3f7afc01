"""The same sparsity in every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prunus.allocators.base import Allocation, Allocator, Problem, filled, register_allocator


@register_allocator
@dataclass(frozen=True)
class Uniform(Allocator):
    """Every layer at the target, but for those that are sparser than that already."""

    name: ClassVar[str] = "uniform"

    def allocate(self, problem: Problem) -> Allocation:
        share, units = problem.sparsity_target, problem.units
        total = round(sum(max(share * unit.size, unit.pruned) for unit in units))
        return filled(problem, [1.0] * len(units), total)
