"""What a pruning method is, and the registry of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from prunus.layers import Layer
from prunus.names import Registry
from prunus.patterns import Pattern
from prunus.stats import Statistic


class Proposal(NamedTuple):
    """What a method says about one layer, seen as a (rows, cols) matrix.

    ``scores`` (rows, cols) are importances: the lowest go. ``rebuild`` maps a (rows, cols)
    keep-mask to the new weight; what the mask drops is zeroed whatever it returns there.
    """

    scores: Tensor
    rebuild: Callable[[Tensor], Tensor]


@runtime_checkable
class Pruner(Protocol):
    """A published method: a frozen dataclass of its hyperparameters.

    ``name`` is what recipes call it, ``patterns`` the kinds it supports, ``allocator`` how the
    paper spreads sparsity over layers.
    """

    name: ClassVar[str]
    patterns: ClassVar[tuple[str, ...]]
    allocator: ClassVar[str]

    def statistic(self, layer: Layer) -> Statistic | None:
        """What to measure on calibration data for this layer, if anything."""
        ...

    def propose(self, w: Tensor, stat: Statistic | None, pattern: Pattern) -> Proposal:
        """``w`` is (rows, cols), must not be changed, and holds zeros where pruned before."""
        ...


PRUNERS: Registry[Pruner] = Registry("pruner")
KINDS = ("unstructured", "row", "N:M", "block")
_P = TypeVar("_P", bound="type[Pruner]")


def register_pruner(cls: _P) -> _P:
    """Class decorator: make a pruner known by its ``name`` to recipes and the command line.

    Raises ValueError if the class is not a frozen dataclass, lacks a part of `Pruner`, names an
    unknown pattern kind, or takes the name of another pruner.
    """
    params = getattr(cls, "__dataclass_params__", None)
    if not dataclasses.is_dataclass(cls) or params is None or not params.frozen:
        raise ValueError(f"{cls.__name__} must be a frozen dataclass: @dataclass(frozen=True)")
    parts = ("name", "patterns", "allocator", "statistic", "propose")
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
