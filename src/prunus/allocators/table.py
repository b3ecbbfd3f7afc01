"""Sparsities by name, written by hand or saved from another run."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from prunus.allocators.base import Allocation, Allocator, Problem, filled, register_allocator
from prunus.core.fused_qkv import split_third
from prunus.core.names import did_you_mean


@register_allocator
@dataclass(frozen=True)
class Table(Allocator):
    """Each layer at the sparsity written beside its name.

    With an overall sparsity as well (a schedule, say), all entries are scaled to meet that.
    """

    name: ClassVar[str] = "table"

    sparsities: Mapping[str, float] = field(default_factory=dict)
    """layer name or glob, ``*.qkv[q]`` for thirds -> sparsity; the first that matches counts"""
    file: str | None = None
    """a JSON file of the same, as an Allocation is saved"""

    def __post_init__(self) -> None:
        if bool(self.sparsities) == (self.file is not None):
            raise ValueError("allocator 'table' needs either 'sparsities' or 'file'")
        _check_entries(self.sparsities)

    def _entries(self) -> Mapping[str, float]:
        if self.file is None:
            return self.sparsities
        try:
            entries: dict[str, float] = json.loads(Path(self.file).read_text())
            _check_entries(entries)
        except ValueError as error:
            raise ValueError(f"allocator table: '{self.file}': {error}") from None
        return entries

    def check(self, names: Sequence[str], dense: Collection[str] = ()) -> None:
        """Raises ValueError for a layer without an entry, an entry without one, and a bad file.

        ``dense`` are layers that were chosen and will not be pruned.
        """
        known = [*names, *dense]
        for pattern in self._entries():
            if not any(_matches(name, pattern) for name in known):
                hint = did_you_mean(pattern, known)
                raise ValueError(f"allocator table: {pattern!r} matches no pruned layer{hint}")
        self.rates(names)

    def rates(self, names: Sequence[str]) -> list[float]:
        """The sparsity written for each layer.

        Raises ValueError for a layer without an entry, and a bad file.
        """
        entries = self._entries()
        rates = []
        for name in names:
            hits = [rate for pattern, rate in entries.items() if _matches(name, pattern)]
            if not hits:
                raise ValueError(f"allocator table: no entry for {name!r}; add one, or '*'")
            rates.append(hits[0])
        return rates

    def allocate(self, problem: Problem) -> Allocation:
        units = problem.units
        rates = self.rates([unit.name for unit in units])
        if problem.target is not None:
            return filled(problem, rates)
        pairs = zip(rates, units, strict=True)
        return Allocation(units, [max(round(rate * x.size), x.pruned) for rate, x in pairs])


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern means a layer, or the weight that it is a part of."""
    whole = name.rpartition("[")[0]
    if name == pattern or any(fnmatch.fnmatchcase(x, pattern) for x in (name, whole) if x):
        return True
    base, part = split_third(pattern)
    if numbered := re.fullmatch(r"(.*)\[(\d+)\]", pattern):
        base, part = numbered[1], numbered[2]
    return bool(part) and fnmatch.fnmatchcase(name, f"{base}[[]{part}]")


def _check_entries(entries: Mapping[str, float]) -> None:
    if not isinstance(entries, Mapping):
        raise ValueError("expected a mapping of layer names to sparsities")
    for name, sparsity in entries.items():
        if isinstance(sparsity, str) or not 0 <= sparsity <= 1:
            raise ValueError(f"sparsity {sparsity!r} of {name!r} is not between 0 and 1")
