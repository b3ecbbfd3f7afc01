"""What a recipe may contain: frozen modifiers that bind to a training run as live runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import nn

from prunus.block_walk import Sequential
from prunus.calibration import Calibration
from prunus.masking import Masks
from prunus.names import Registry
from prunus.timing import Timeline

log = logging.getLogger("prunus")


def _discard(event: dict[str, Any]) -> None:
    pass


@dataclass
class Context:
    """What runs share: the user's objects, the clock, the masks and where events are recorded."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | None = None
    timeline: Timeline = field(default_factory=Timeline)
    calibration: Calibration | None = None
    masks: Masks = field(default_factory=Masks)
    record: Callable[[dict[str, Any]], None] = _discard
    owners: dict[str, object] = field(default_factory=dict)
    """layer -> the run that keeps its mask: the one that pruned it last"""
    one_shot: bool = False
    sequential: Sequential | None = None
    """how to go through the blocks, where a recipe does not say it all"""


class Run:
    """A modifier at work. A step count is the number of optimizer steps done."""

    def prepare(self) -> None:
        """At the end of attaching, once all runs are bound: what the first forward pass must see.

        A resumed run loads its state afterwards.
        """

    def start(self) -> None:
        """Before the first step of a run that begins at step 0; a resumed run has passed it.

        Raises ValueError if the model is in no state to begin with.
        """

    def before_step(self, step: int) -> None:
        """Before optimizer step number ``step + 1``."""

    def before_update(self, step: int) -> None:
        """In that step, once gradients are there: a closure computes them (LBFGS, Lightning)."""

    def settle(self, step: int) -> None:
        """After optimizer step number ``step``, in all runs before `after_step`: put masks on."""

    def after_step(self, step: int) -> None:
        """After optimizer step number ``step``."""

    def skipped(self, step: int) -> None:
        """In place of `settle` and `after_step`, where GradScaler found infinite gradients."""

    @property
    def due(self) -> int | None:
        """The step of the last thing that is still to be done; None if nothing is."""
        return None

    def finish(self, step: int) -> None:
        """Once, when training is over: do what is still due."""

    def release(self) -> None:
        """Once, at the very end, errors included: put back what is not meant to last."""

    def plan(self) -> list[tuple[int, str]]:
        """(step, what will happen) for `prunus check`."""
        return []

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@runtime_checkable
class Modifier(Protocol):
    """A frozen dataclass; ``name`` is its key in recipes, ``one_shot`` whether `prune` takes it."""

    name: ClassVar[str]
    one_shot: ClassVar[bool]

    def bind(self, context: Context) -> Run:
        """Raises ValueError if it does not fit the model, the optimizer or the timeline."""
        ...


MODIFIERS: Registry[Modifier] = Registry("modifier")
