"""Erdos-Renyi-Kernel: small layers stay denser.

U. Evci et al., "Rigging the lottery", 2020, https://arxiv.org/abs/1911.11134, section 3.1. Layers
that would be more than dense are kept dense, and the rest carries their share, as there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from prunus.allocators.base import Allocation, Allocator, Problem, fill, register_allocator


@register_allocator
@dataclass(frozen=True)
class ERK(Allocator):
    """Density proportional to ``sum(shape) / prod(shape)``, kernel sizes included."""

    name: ClassVar[str] = "erk"

    def allocate(self, problem: Problem) -> Allocation:
        units = problem.units
        shares = [unit.size * sum(unit.shape) / max(1, math.prod(unit.shape)) for unit in units]
        alive = [unit.size - unit.pruned for unit in units]
        kept = fill(shares, [0] * len(units), alive, problem.size - problem.drop)
        return Allocation(units, [u.size - k for u, k in zip(units, kept, strict=True)])
