"""The recipe entry ``freeze``: train only some parameters for a while."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prunus.core.selection import select_parameters
from prunus.core.wrappers import clean_parameters
from prunus.modifiers.base import MODIFIERS, Context, Run
from prunus.modifiers.fields import as_in_recipes
from prunus.modifiers.timing import Interval


@dataclass(frozen=True)
class Freeze:
    """Parameters that are not updated: their gradients are dropped before each step.

    ``requires_grad`` stays as it is, because DDP and FSDP have built their communication on it;
    freezing this way costs the gradients but breaks no wrapper.
    """

    name: ClassVar[str] = "freeze"
    one_shot: ClassVar[bool] = False

    parameters: tuple[str, ...] = ("*",)
    """parameter names, globs or `re:` regexes"""
    exclude: tuple[str, ...] = ()
    """parameters to train all the same: `exclude: ["head.*"]` trains only the head"""
    window: Interval | None = None
    """when; default: all of training"""

    def __post_init__(self) -> None:
        as_in_recipes(self)

    def bind(self, context: Context) -> Run:
        return FreezeRun(self, context)


MODIFIERS.add(Freeze.name, Freeze)


class FreezeRun(Run):
    def __init__(self, modifier: Freeze, context: Context) -> None:
        parameters = clean_parameters(context.model)
        self.frozen = select_parameters(parameters, modifier.parameters, modifier.exclude)
        self.begin, self.end = (modifier.window or Interval()).bounds(context.timeline)

    def before_step(self, step: int) -> None:
        if self.begin <= step and (self.end is None or step < self.end):
            for parameter in self.frozen.values():
                parameter.grad = None

    def before_update(self, step: int) -> None:
        self.before_step(step)  # a closure has made new ones

    def timetable(self) -> list[tuple[int, str]]:
        return [(self.begin, f"freeze {len(self.frozen)} parameters")]
