"""How much of the target each layer carries."""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from prunus.core.extension import Extensible, check_settings, complete
from prunus.core.layers import Layer
from prunus.core.names import Registry
from prunus.stats import Statistic


@dataclass(frozen=True)
class Unit:
    """What an allocator decides about: a layer, counted in the pattern's units.

    >>> prunus.Unit("fc", shape=(4, 4), size=16, pruned=2)
    Unit(name='fc', shape=(4, 4), size=16, pruned=2)
    """

    name: str
    shape: tuple[int, ...]
    size: int
    """units in the layer: weights, or blocks"""
    pruned: int
    """units that are zero already and stay so"""


def _no_scores(k: int) -> list[int]:
    raise ValueError(
        "there are no scores here to rank all layers by: the pruner chooses while it solves, or "
        "goes block by block; use allocator 'uniform', 'erk' or a table"
    )


@dataclass(frozen=True)
class Problem:
    """``lowest(k)`` says how many of the k lowest-scored units of the model lie in each layer.

    ``signals`` are what a `SignalAllocator` measured, by layer name.

    >>> units = [prunus.Unit("a", (4, 4), 16, 0), prunus.Unit("b", (4, 8), 32, 0)]
    >>> problem = prunus.Problem(units, target=0.5)
    >>> problem.size, problem.drop
    (48, 24)
    """

    units: Sequence[Unit]
    target: float | None
    lowest: Callable[[int], list[int]] = _no_scores
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
    """Units to be gone in each layer, in the order of the problem's units.

    >>> prunus.Allocation([prunus.Unit("fc", (4, 4), 16, 0)], drop=[12]).sparsity
    {'fc': 0.75}
    """

    units: Sequence[Unit]
    drop: Sequence[int]

    @property
    def sparsity(self) -> dict[str, float]:
        pairs = zip(self.units, self.drop, strict=True)
        return {unit.name: drop / max(1, unit.size) for unit, drop in pairs}

    def save(self, path: str | Path) -> None:
        """JSON, ``{layer: sparsity}``; the allocator ``table`` reads it."""
        Path(path).write_text(json.dumps(self.sparsity, indent=2) + "\n")


class Allocator(Extensible):
    """A frozen dataclass of settings. It decides and never prunes.

    >>> @dataclass(frozen=True)
    ... class FirstHalf(prunus.Allocator):
    ...     name = "first_half"
    ...     def allocate(self, problem):
    ...         return prunus.filled(problem, [0.5] + [1.0] * (len(problem.units) - 1))
    >>> units = [prunus.Unit("a", (4, 4), 16, 0), prunus.Unit("b", (4, 4), 16, 0)]
    >>> FirstHalf().allocate(prunus.Problem(units, target=0.75)).drop
    [8, 16]
    """

    PARTS: ClassVar[tuple[str, ...]] = ("name", "allocate")

    name: ClassVar[str]
    """what recipes call it"""
    ranks_scores: ClassVar[bool] = False
    """whether it calls `Problem.lowest`, for which all layers must have scores at the same time"""

    @abstractmethod
    def allocate(self, problem: Problem) -> Allocation:
        """Raises ValueError if the target cannot be met."""


class SignalAllocator(Allocator):
    """One that measures a signal in each block of layers first.

    >>> @dataclass(frozen=True)
    ... class Size(prunus.SignalAllocator):
    ...     name = "size"
    ...     def signal(self, block):
    ...         return float(sum(w.abs().sum() for w, _ in block))
    ...     def allocate(self, problem):
    ...         return prunus.filled(problem, [1 / problem.signals[u.name] for u in problem.units])
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    >>> prunus.prune(model, "magnitude", sparsity=0.5, allocator=Size()).sparsity
    0.5
    """

    PARTS: ClassVar[tuple[str, ...]] = ("name", "allocate", "statistic", "signal")

    def statistic(self, layer: Layer) -> Statistic | None:
        """What to measure on calibration data for this layer, if anything."""
        return None

    @abstractmethod
    def signal(self, block: Sequence[tuple[Tensor, Any]]) -> float:
        """A number for the layers of one block, from their weights, (rows, cols), and statistics.

        A layer that is in no block comes alone.
        """


ALLOCATORS: Registry[Allocator] = Registry("allocator", Allocator, ("name", "allocate"))
_A = TypeVar("_A", bound=Allocator)


def register_allocator(cls: type[_A]) -> type[_A]:
    """Class decorator: make an allocator known by its ``name`` to recipes and the command line.

    It derives from `Allocator` or `SignalAllocator`; one that does not gets the defaults it lacks.
    Raises ValueError if the class is not a frozen dataclass, lacks a part, or takes the name of
    another one.

    >>> @prunus.register_allocator
    ... @dataclass(frozen=True)
    ... class Example(prunus.Allocator):
    ...     name = "example"
    ...     def allocate(self, problem):
    ...         return prunus.filled(problem, [1.0] * len(problem.units))
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    >>> prunus.prune(model, "magnitude", sparsity=0.5, allocator="example").sparsity
    0.5
    """
    check_settings(cls, "allocator", ("name", "ranks_scores"))
    if hasattr(cls, "signal"):
        complete(cls, SignalAllocator, "allocator", ("name", "allocate", "signal"))
    ALLOCATORS.add(getattr(cls, "name", ""), cls)
    return cls


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
    """Sparsities in proportion to `rates`, scaled to meet the target, or `total` units, exactly.

    Raises ValueError for rates that are negative, NaN or infinite, or not one for each unit.

    >>> units = [prunus.Unit("a", (4, 4), 16, 0), prunus.Unit("b", (4, 4), 16, 0)]
    >>> prunus.filled(prunus.Problem(units, target=0.5), rates=[1.0, 3.0]).drop
    [4, 12]
    """
    sizes = [unit.size for unit in problem.units]
    wrong = [rate for rate in rates if not 0 <= rate < math.inf]
    if wrong or len(rates) != len(sizes):
        what = f"one is {wrong[0]}" if wrong else f"there are {len(rates)} for {len(sizes)} layers"
        raise ValueError(f"rates of layers are numbers from 0 on, one for each; {what}")
    shares = [rate * size for rate, size in zip(rates, sizes, strict=True)]
    pruned = [unit.pruned for unit in problem.units]
    drop = problem.drop if total is None else total
    return Allocation(problem.units, fill(shares, pruned, sizes, drop))
