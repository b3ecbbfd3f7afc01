"""`Run`: a modifier at work."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from math import inf
from types import MappingProxyType
from typing import Any, ClassVar

from prunus.core.layers import Layer
from prunus.engine.plan import PruningPlan
from prunus.modifiers.context import Context


class Run:
    """A modifier at work. A step count is the number of optimizer steps done.

    A run that sets masks says of which layers and when, so that no other run undoes them.

    >>> class Count(prunus.Run):
    ...     steps = 0
    ...     def prune(self, step):
    ...         self.steps = step
    >>> run = Count()
    >>> run.prune(3)
    >>> run.steps, run.timetable()
    (3, [])
    """

    prunes: ClassVar[bool] = False
    """whether its masks only ever take more, so that another run may mask the layers as well"""
    trains: ClassVar[bool] = False
    """whether pruned weights train on behind its masks, so that no other run may mask the layers"""
    context: Context
    pruning: PruningPlan | None = None
    """what it prunes and how, where it does so by a `PruningPlan`"""
    spared: Mapping[str, str] = MappingProxyType({})
    """layers that its default leaves dense, each with the reason"""
    misfits: Mapping[str, str] = MappingProxyType({})
    """layer name -> why it does not fit, and is left dense"""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for old, new in _RENAMED.items():
            if old in vars(cls) and new not in vars(cls):
                warnings.warn(f"{cls.__name__}.{old} is now {new}", FutureWarning, stacklevel=2)
                setattr(cls, new, vars(cls)[old])

    @property
    def masked_layers(self) -> Sequence[Layer]:
        """The layers whose masks it sets, sooner or later."""
        layers: Sequence[Layer] = getattr(self, "layers", ())
        return layers

    @property
    def left_dense(self) -> list[str]:
        """Names of the layers that its default leaves dense."""
        return list(self.spared)

    @property
    def soft(self) -> bool:
        """Whether masked weights are not meant to be zero at present."""
        return False

    @property
    def span(self) -> tuple[float, float]:
        """Steps between which it sets masks anew."""
        return 0, inf

    def on_attach(self) -> None:
        """At the end of attaching, once all runs are bound: what the first forward pass must see.

        A resumed run loads its state afterwards.
        """

    def check_data(self) -> None:
        """Raises ValueError if it will need calibration data and there is none."""

    def start(self) -> None:
        """Before the first step of a run that begins at step 0; a resumed run has passed it.

        Raises ValueError if the model is in no state to begin with.
        """

    def before_step(self, step: int) -> None:
        """Before optimizer step number ``step + 1``."""

    def before_update(self, step: int) -> None:
        """In that step, once gradients are there: a closure computes them (LBFGS, Lightning)."""

    def apply_masks(self, step: int) -> None:
        """After optimizer step number ``step``, in all runs before `prune`: put masks on.

        Windows that have masked until now end here, so that others may begin in `begin_window`.
        """

    def prune(self, step: int) -> None:
        """After optimizer step number ``step``: what is due by then."""

    def begin_window(self, step: int) -> None:
        """After optimizer step number ``step``, in all runs last: masks that begin to act."""

    def skipped(self, step: int) -> None:
        """In place of those three, where GradScaler found infinite gradients."""

    @property
    def due(self) -> int | None:
        """The step of the last thing that is still to be done; None if nothing is."""
        return None

    def next_change(self, step: int) -> int | None:
        """The first step, from ``step`` on, after which other weights are pruned; None: none is."""
        return None

    def finish(self, step: int) -> None:
        """Once, when training is over: do what is still due."""

    def detach(self) -> None:
        """Once, at the very end, errors included: put back what is not meant to last."""

    def timetable(self) -> list[tuple[int, str]]:
        """(step, what will happen) for `prunus check`."""
        return []

    def memory(self) -> dict[str, int]:
        """Bytes beyond the model, by what they are for."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def check_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError for what `load_state_dict` could not load; changes nothing.

        Called for all runs before any of them loads.
        """

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


_RENAMED = {
    "settle": "apply_masks",
    "after_step": "prune",
    "enter": "begin_window",
    "prepare": "on_attach",
    "release": "detach",
    "plan": "timetable",
}
"""methods of runs, as version 0.1 called them"""
