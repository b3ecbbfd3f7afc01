"""What a pruning method is, and the registry of them."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from prunus.core.extension import Extensible, check_settings, complete
from prunus.core.layers import Layer
from prunus.core.names import Registry
from prunus.core.patterns import NM, Pattern
from prunus.core.ranks import Ranks
from prunus.stats import Statistic

KINDS = ("unstructured", "row", "N:M", "N:M along outputs", "block")
RAMPS: dict[str, Callable[[float, float, float], float]] = {
    "linear": lambda t, a, b: a + (b - a) * t,
    "cubic": lambda t, a, b: b + (a - b) * (1 - t) ** 3,
    "geometric": lambda t, a, b: 1 - (1 - a) * ((1 - b) / (1 - a)) ** t if a < 1 else b,
}


class Pruner(Extensible):
    """A published method: a frozen dataclass of its hyperparameters.

    Below, ``w`` is a layer as a (rows, cols) matrix, or some rows of it; it must not be changed,
    and holds zeros where it was pruned before.

    >>> pruner = prunus.CAP(block_size=64)
    >>> pruner.name, pruner.allocator, pruner.patterns
    ('cap', 'global', ('unstructured', 'row', 'N:M'))
    >>> isinstance(pruner, prunus.Pruner)
    True
    """

    name: ClassVar[str]
    """what recipes call it"""
    patterns: ClassVar[tuple[str, ...]] = ("unstructured", "row", "N:M", "block")
    """the kinds of patterns it can prune to"""
    allocator: ClassVar[str] = "uniform"
    """how the paper spreads sparsity over layers"""

    num_recomputations: int = 1
    """stages of a pruning step, each of which measures anew"""
    ramp: str = "geometric"
    """how sparsity goes up over those stages, of `RAMPS`"""

    def statistic(self, layer: Layer) -> Statistic | None:
        """What to measure on calibration data for this layer, if anything."""
        return None

    def check(self, cols: int, pattern: Pattern) -> None:
        """Raises ValueError if layers of so many columns do not go with the pattern."""

    def stages(self, present: float, target: float) -> list[float]:
        """The sparsity after each stage, from the present one on."""
        count, ramp = self.num_recomputations, RAMPS[self.ramp]
        return [*(ramp(k / count, present, target) for k in range(1, count)), target]

    def stages_of_groups(self, pattern: NM) -> list[NM]:
        """N falling from M to the pattern's N, over at most as many stages."""
        steps = min(self.num_recomputations, pattern.m - pattern.n)
        kept = [pattern.m - round((pattern.m - pattern.n) * k / steps) for k in range(1, steps + 1)]
        return [NM(n, pattern.m) for n in kept]


class ScorePruner(Pruner):
    """Scores all weights, and rebuilds the layer once the mask is known.

    >>> @dataclass(frozen=True)
    ... class Largest(prunus.ScorePruner):
    ...     name = "largest"
    ...     def scores(self, w, stat, pattern, ranks):
    ...         return -w.abs()
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> result = prunus.prune(model, Largest(), sparsity=0.5)
    >>> result.rows[0].zeros
    2
    """

    PARTS: ClassVar[tuple[str, ...]] = (
        "name",
        "patterns",
        "allocator",
        "statistic",
        "scores",
        "rebuild",
    )

    @abstractmethod
    def scores(self, w: Tensor, stat: Any, pattern: Pattern, ranks: Ranks) -> Tensor:
        """(rows, cols) importances: the lowest go. `ranks` may hold other rows of the layer."""

    def refine(self, w: Tensor, stat: Any, mask: Tensor, pattern: Pattern) -> Tensor:
        """A keep-mask of the same pattern, with as many weights in each row, before `rebuild`."""
        return mask

    def rebuild(self, w: Tensor, stat: Any, mask: Tensor) -> Tensor:
        """The new weight for a keep-mask; what the mask drops is zeroed whatever stands there."""
        return w


class JointPruner(Pruner):
    """Chooses the mask while it solves, so a layer's share must be known before.

    >>> @dataclass(frozen=True)
    ... class Halves(prunus.JointPruner):
    ...     name = "halves"
    ...     def solve(self, w, stat, pattern, drop, ranks):
    ...         mask = ranks.keep_all_but_lowest(w.abs(), drop)
    ...         return w / 2, mask
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> prunus.prune(model, Halves(), sparsity=0.5).sparsity
    0.5
    """

    PARTS: ClassVar[tuple[str, ...]] = ("name", "patterns", "allocator", "statistic", "solve")

    @abstractmethod
    def solve(
        self, w: Tensor, stat: Any, pattern: Pattern, drop: int, ranks: Ranks
    ) -> tuple[Tensor, Tensor]:
        """New weight and keep-mask, with `drop` weights gone in all, zeros of before included.

        `drop` counts the whole layer, of which `ranks` may hold other rows; for pattern `row` it
        counts the rows of `w`.
        """


PRUNERS: Registry[Pruner] = Registry("pruner", Pruner, ("name",))
_P = TypeVar("_P", bound=Pruner)


def register_pruner(cls: type[_P]) -> type[_P]:
    """Class decorator: make a pruner known by its ``name`` to recipes and the command line.

    It derives from `ScorePruner` or `JointPruner`; one that does not gets the defaults it lacks.
    Raises ValueError if the class is not a frozen dataclass, lacks a part, names an unknown pattern
    kind, or takes the name of another pruner.

    >>> @prunus.register_pruner
    ... @dataclass(frozen=True)
    ... class Example(prunus.ScorePruner):
    ...     name = "example"
    ...     def scores(self, w, stat, pattern, ranks):
    ...         return w.square()
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    >>> prunus.prune(model, "example", sparsity=0.5).sparsity
    0.5
    """
    check_settings(cls, "pruner", ("name", "patterns", "allocator"))
    if hasattr(cls, "sweep") and not hasattr(cls, "solve"):
        warnings.warn(f"{cls.__name__}.sweep is now called solve", FutureWarning, stacklevel=2)
        cls.solve = cls.sweep  # type: ignore[attr-defined]
    joint = hasattr(cls, "solve") and not issubclass(cls, ScorePruner)
    if joint:
        complete(cls, JointPruner, "pruner", ("name", "solve"))
    else:
        complete(cls, ScorePruner, "pruner", ("name", "scores"))
    if isinstance(cls.patterns, str) or (unknown := set(cls.patterns) - set(KINDS)):
        wrong = cls.patterns if isinstance(cls.patterns, str) else sorted(unknown)
        raise ValueError(
            f"pruner {cls.__name__}: patterns has {wrong}; write a tuple of {', '.join(KINDS)}"
        )
    PRUNERS.add(cls.name, cls)
    return cls


def list_pruners() -> list[str]:
    """Names of all registered pruners, sorted.

    >>> "cap" in prunus.list_pruners()
    True
    """
    return list(PRUNERS)


def supports(pruner: Pruner, pattern: Pattern) -> None:
    """Raises ValueError if the method has no such pattern."""
    if pattern.kind not in pruner.patterns:
        raise ValueError(
            f"pruner {pruner.name!r} cannot prune to pattern '{pattern}'; "
            f"it supports: {', '.join(pruner.patterns)}"
        )
