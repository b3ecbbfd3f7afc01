"""What a pruning method is, and the registry of them."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from prunus.core.layers import Layer
from prunus.core.names import Registry
from prunus.core.patterns import Pattern
from prunus.core.ranks import Ranks
from prunus.stats import Statistic


@runtime_checkable
class Pruner(Protocol):
    """A published method: a frozen dataclass of its hyperparameters.

    ``name`` is what recipes call it, ``patterns`` the kinds it supports, ``allocator`` how the
    paper spreads sparsity over layers. Below, ``w`` is a layer as a (rows, cols) matrix, or some
    rows of it; it must not be changed, and holds zeros where it was pruned before.
    """

    name: ClassVar[str]
    patterns: ClassVar[tuple[str, ...]]
    allocator: ClassVar[str]

    def statistic(self, layer: Layer) -> Statistic | None:
        """What to measure on calibration data for this layer, if anything."""
        ...


@runtime_checkable
class ScorePruner(Pruner, Protocol):
    """Scores all weights, and rebuilds the layer once the mask is known."""

    def scores(self, w: Tensor, stat: Any, pattern: Pattern, ranks: Ranks) -> Tensor:
        """(rows, cols) importances: the lowest go. `ranks` may hold other rows of the layer."""
        ...

    def rebuild(self, w: Tensor, stat: Any, mask: Tensor) -> Tensor:
        """The new weight for a keep-mask; what the mask drops is zeroed whatever stands there."""
        ...


@runtime_checkable
class RefiningPruner(ScorePruner, Protocol):
    """Looks at the mask once more before it rebuilds."""

    def refine(self, w: Tensor, stat: Any, mask: Tensor, pattern: Pattern) -> Tensor:
        """A keep-mask of the same pattern, with as many weights in each row."""
        ...


@runtime_checkable
class JointPruner(Pruner, Protocol):
    """Chooses the mask while it solves, so a layer's share must be known before."""

    def solve(
        self, w: Tensor, stat: Any, pattern: Pattern, drop: int, ranks: Ranks
    ) -> tuple[Tensor, Tensor]:
        """New weight and keep-mask, with `drop` weights gone in all, zeros of before included.

        `drop` counts the whole layer, of which `ranks` may hold other rows; for pattern `row` it
        counts the rows of `w`.
        """
        ...


PRUNERS: Registry[Pruner] = Registry("pruner")
KINDS = ("unstructured", "row", "N:M", "N:M along outputs", "block")
_P = TypeVar("_P", bound="type[Pruner]")


def register_pruner(cls: _P) -> _P:
    """Class decorator: make a pruner known by its ``name`` to recipes and the command line.

    Raises ValueError if the class is not a frozen dataclass, lacks a part of `Pruner`, names an
    unknown pattern kind, or takes the name of another pruner.
    """
    params = getattr(cls, "__dataclass_params__", None)
    if not dataclasses.is_dataclass(cls) or params is None or not params.frozen:
        raise ValueError(f"{cls.__name__} must be a frozen dataclass: @dataclass(frozen=True)")
    if hasattr(cls, "sweep") and not hasattr(cls, "solve"):
        warnings.warn(f"{cls.__name__}.sweep is now called solve", FutureWarning, stacklevel=2)
        cls.solve = cls.sweep
    solving = ("solve",) if hasattr(cls, "solve") else ("scores", "rebuild")
    parts = ("name", "patterns", "allocator", "statistic", *solving)
    if missing := [part for part in parts if not hasattr(cls, part)]:
        raise ValueError(f"pruner {cls.__name__} lacks {', '.join(missing)}")
    if unknown := set(cls.patterns) - set(KINDS):
        raise ValueError(f"{cls.__name__}.patterns has {sorted(unknown)}; kinds are {KINDS}")
    PRUNERS.add(cls.name, cls)
    return cls


def list_pruners() -> list[str]:
    """Names of all registered pruners, sorted."""
    return list(PRUNERS)


def supports(pruner: Pruner, pattern: Pattern) -> None:
    """Raises ValueError if the method has no such pattern."""
    if pattern.kind not in pruner.patterns:
        raise ValueError(
            f"pruner {pruner.name!r} cannot prune to pattern '{pattern}'; "
            f"it supports: {', '.join(pruner.patterns)}"
        )
