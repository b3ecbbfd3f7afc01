"""How much of the target each layer carries."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from prunus.core.layers import Layer
from prunus.core.names import Registry
from prunus.stats import Statistic


@dataclass(frozen=True)
class Unit:
    """What an allocator decides about: a layer, counted in the pattern's units."""

    name: str
    shape: tuple[int, ...]
    size: int
    """units in the layer: weights, or blocks"""
    pruned: int
    """units that are zero already and stay so"""


@dataclass(frozen=True)
class Problem:
    """``lowest(k)`` says how many of the k lowest-scored units of the model lie in each layer.

    ``signals`` are what a `SignalAllocator` measured, by layer name.
    """

    units: Sequence[Unit]
    target: float | None
    lowest: Callable[[int], list[int]]
    signals: Mapping[str, float] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return sum(unit.size for unit in self.units)

    @property
    def pruned(self) -> int:
        return sum(unit.pruned for unit in self.units)

    @property
    def drop(self) -> int:
        """Units to be gone in all, exactly; never fewer than are gone already."""
        return max(round(self.sparsity_target * self.size), self.pruned)

    @property
    def sparsity_target(self) -> float:
        """The target. Raises ValueError if there is none."""
        if self.target is None:
            raise ValueError("no sparsity was given; give one, such as sparsity=0.75")
        return self.target


@dataclass(frozen=True)
class Allocation:
    """Units to be gone in each layer, in the order of the problem's units."""

    units: Sequence[Unit]
    drop: Sequence[int]

    @property
    def sparsity(self) -> dict[str, float]:
        pairs = zip(self.units, self.drop, strict=True)
        return {unit.name: drop / max(1, unit.size) for unit, drop in pairs}

    def save(self, path: str | Path) -> None:
        """JSON, ``{layer: sparsity}``; the allocator ``table`` reads it."""
        Path(path).write_text(json.dumps(self.sparsity, indent=2) + "\n")


@runtime_checkable
class Allocator(Protocol):
    """A frozen dataclass; ``name`` is what recipes call it. It decides and never prunes."""

    name: ClassVar[str]

    def allocate(self, problem: Problem) -> Allocation:
        """Raises ValueError if the target cannot be met."""
        ...


@runtime_checkable
class SignalAllocator(Allocator, Protocol):
    """One that measures a signal in each block of layers first."""

    def statistic(self, layer: Layer) -> Statistic | None:
        """What to measure on calibration data for this layer, if anything."""
        ...

    def signal(self, block: Sequence[tuple[Tensor, Any]]) -> float:
        """A number for the layers of one block, from their weights, (rows, cols), and statistics.

        A layer that is in no block comes alone.
        """
        ...


ALLOCATORS: Registry[Allocator] = Registry("allocator")


def fill(shares: Sequence[float], low: Sequence[int], high: Sequence[int], total: int) -> list[int]:
    """Integers proportional to `shares` within [low, high] that add up to `total` exactly.

    A layer at its bound passes what it cannot carry on to the others in proportion; what
    rounding leaves goes to the largest remainders, the first of equal ones.

    Raises ValueError if no such integers exist.
    """
    if not sum(low) <= total <= sum(high):
        raise ValueError(f"cannot place {total} units within bounds {sum(low)} and {sum(high)}")

    def clipped(scale: float) -> list[float]:
        triples = zip(shares, low, high, strict=True)
        return [min(max(scale * share, bottom), top) for share, bottom, top in triples]

    below, above = 0.0, 1.0
    while sum(clipped(above)) < total and above < 1e18:
        above *= 2
    if sum(clipped(above)) < total - 0.5:
        raise ValueError(f"the layers with a share above zero cannot carry {total} units")
    for _ in range(200):
        middle = (below + above) / 2
        below, above = (middle, above) if sum(clipped(middle)) < total else (below, middle)
    exact = clipped(above)
    whole = [max(int(x + 1e-9), bottom) for x, bottom in zip(exact, low, strict=True)]
    order = sorted(range(len(whole)), key=lambda i: (whole[i] - exact[i], i))
    rest = total - sum(whole)
    while rest:
        step = 1 if rest > 0 else -1
        for i in order if step > 0 else reversed(order):
            if rest and low[i] <= whole[i] + step <= high[i]:
                whole[i] += step
                rest -= step
    return whole


def places(problem: Problem) -> list[float]:
    """Where the signal of each unit lies: 0 for the lowest, 1 for the highest; 0.5 if all equal."""
    signals = [problem.signals[unit.name] for unit in problem.units]
    low, width = min(signals), max(signals) - min(signals)
    return [(signal - low) / width if width > 0 else 0.5 for signal in signals]


def filled(problem: Problem, rates: Sequence[float], total: int | None = None) -> Allocation:
    """Sparsities in proportion to `rates`, scaled to meet the target, or `total` units, exactly."""
    sizes = [unit.size for unit in problem.units]
    shares = [rate * size for rate, size in zip(rates, sizes, strict=True)]
    pruned = [unit.pruned for unit in problem.units]
    drop = problem.drop if total is None else total
    return Allocation(problem.units, fill(shares, pruned, sizes, drop))
