"""What a recipe may contain: frozen modifiers that bind to a training run as live runs."""

from __future__ import annotations

import logging
from typing import ClassVar, Protocol, TypeVar, runtime_checkable

from torch import nn

from prunus.calibration.calibration import Calibration
from prunus.core.extension import check_parts, check_settings
from prunus.core.names import Registry
from prunus.engine.plan import PruningPlan
from prunus.engine.sequential.options import Sequential
from prunus.modifiers.context import Context
from prunus.modifiers.runs import Run

__all__ = ["MODIFIERS", "Context", "Modifier", "OneShotModifier", "Run", "register_modifier"]

log = logging.getLogger("prunus")


@runtime_checkable
class Modifier(Protocol):
    """A frozen dataclass; ``name`` is its key in recipes, ``one_shot`` whether `prune` takes it.

    >>> @dataclass(frozen=True)
    ... class Nothing(prunus.Modifier):
    ...     name = "nothing"
    ...     one_shot = False
    ...     def bind(self, context):
    ...         return prunus.Run()
    >>> isinstance(Nothing(), prunus.Modifier)
    True
    """

    name: ClassVar[str]
    one_shot: ClassVar[bool]

    def bind(self, context: Context) -> Run:
        """Raises ValueError if it does not fit the model, the optimizer or the timeline."""
        ...


@runtime_checkable
class OneShotModifier(Modifier, Protocol):
    """One that a finished model takes too.

    >>> isinstance(prunus.PruningModifier(sparsity=0.5), prunus.OneShotModifier)
    True
    """

    @property
    def final_sparsity(self) -> float | None:
        """Share of the weights removed in the end; None where a pattern or a table says it."""
        ...

    def plan(
        self,
        model: nn.Module,
        calibration: Calibration | None = None,
        sequential: Sequential | None = None,
    ) -> PruningPlan:
        """What to prune and how; ``sequential`` stands in for the modifier's own.

        Raises ValueError if it does not fit the model.
        """
        ...


MODIFIERS: Registry[Modifier] = Registry("modifier")
_M = TypeVar("_M", bound=Modifier)


def register_modifier(cls: type[_M]) -> type[_M]:
    """Class decorator: make a modifier known by its ``name`` to recipes and the command line.

    `prune` leaves it out unless it says ``one_shot``. Raises ValueError if the class is not a
    frozen dataclass, lacks a part, or takes the name of another one.

    >>> @prunus.register_modifier
    ... @dataclass(frozen=True)
    ... class Example(prunus.Modifier):
    ...     name = "example"
    ...     def bind(self, context):
    ...         return prunus.Run()
    >>> prunus.Recipe.load("modifiers: [example: {}]").modifiers
    (Example(),)
    """
    check_settings(cls, "modifier", ("name", "one_shot"))
    own = getattr(cls, "bind", None) is not Modifier.bind
    check_parts(cls, Modifier, "modifier", ("name", "bind" if own else "bind(context)"))
    if not hasattr(cls, "one_shot"):
        cls.one_shot = False
    MODIFIERS.add(cls.name, cls)
    return cls
