"""Sparsities by name, written by hand or saved from another run."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from prunus.allocators.base import ALLOCATORS, Allocation, Problem, fill
from prunus.names import did_you_mean


@dataclass(frozen=True)
class Table:
    """Each layer at the sparsity written beside its name.

    With an overall sparsity as well (a schedule, say), all entries are scaled to meet that.
    """

    name: ClassVar[str] = "table"

    sparsities: Mapping[str, float] = field(default_factory=dict)
    """layer name or glob -> sparsity; the first that matches counts"""
    file: str | None = None
    """a JSON file of the same, as an Allocation is saved"""

    def __post_init__(self) -> None:
        if bool(self.sparsities) == (self.file is not None):
            raise ValueError("allocator 'table' needs either 'sparsities' or 'file'")
        for name, sparsity in self.sparsities.items():
            if not 0 <= sparsity <= 1:
                raise ValueError(f"sparsity {sparsity} of {name!r} is not between 0 and 1")

    def _entries(self) -> Mapping[str, float]:
        if self.file is None:
            return self.sparsities
        entries: dict[str, float] = json.loads(Path(self.file).read_text())
        return entries

    def allocate(self, problem: Problem) -> Allocation:
        entries, units = self._entries(), problem.units
        names = [unit.name for unit in units]
        for pattern in entries:
            if not fnmatch.filter(names, pattern):
                hint = did_you_mean(pattern, names)
                raise ValueError(f"allocator table: {pattern!r} matches no pruned layer{hint}")
        rates = []
        for unit in units:
            hits = [
                rate for pattern, rate in entries.items() if fnmatch.fnmatchcase(unit.name, pattern)
            ]
            if not hits:
                raise ValueError(f"allocator table: no entry for {unit.name!r}; add one, or '*'")
            rates.append(hits[0])
        exact = [rate * unit.size for rate, unit in zip(rates, units, strict=True)]
        pruned = [unit.pruned for unit in units]
        if problem.target is None:
            drop = [max(round(gone), low) for gone, low in zip(exact, pruned, strict=True)]
        else:
            sizes = [unit.size for unit in units]
            drop = fill(exact, pruned, sizes, problem.drop)
        return Allocation(units, drop)


ALLOCATORS.add(Table.name, Table)
