"""What a recipe may contain: frozen modifiers that bind to a training run as live runs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from prunus.calibration.calibration import Calibration
from prunus.core.extension import check_parts, check_settings
from prunus.core.layers import Layer
from prunus.core.mask_registry import Masks
from prunus.core.masks import local, zero_pruned
from prunus.core.names import Registry, few
from prunus.engine.plan import PruningPlan
from prunus.engine.sequential.access import Sequential
from prunus.modifiers.optimizer_state import keeps_copies, states_of, zero_momentum
from prunus.modifiers.timing import Timeline

log = logging.getLogger("prunus")


def _discard(event: dict[str, Any]) -> None:
    pass


@dataclass
class Context:
    """What runs share: the user's objects, the clock, the masks and where events are recorded.

    >>> context = prunus.Context(nn.Linear(2, 2), torch.optim.SGD([nn.Parameter(torch.ones(1))]))
    >>> len(context.masks), context.timeline.total
    (0, None)
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    timeline: Timeline = field(default_factory=Timeline)
    calibration: Calibration | None = None
    masks: Masks = field(default_factory=Masks)
    record: Callable[[dict[str, Any]], None] = _discard

    def mask(self, run: Run, layer: Layer, mask: Tensor) -> None:
        """Set a layer's mask, which the run owns from now on; what it prunes loses its momentum."""
        self.masks.put(layer, mask, run)
        zero_momentum(self.optimizer, layer, mask)

    def apply_masks(self, run: Run) -> None:
        """Zero what is pruned in the layers that the run owns, and in copies of their weights."""
        self.masks.apply(run, run.masked_layers)
        owned = self.masks.owned(run, run.masked_layers) if keeps_copies(self.optimizer) else ()
        for layer in owned:
            mask = self.masks.of(layer)
            for state in states_of(self.optimizer, layer):
                if mask is not None and state.get("z") is not None:
                    zero_pruned([layer.part(local(state["z"]))], [mask])

    def check_held(self, layers: Sequence[Layer]) -> None:
        """Raises ValueError unless the optimizer holds every weight that will be masked."""
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        missing = [layer.parameter_name for layer in layers if id(layer.weight) not in held]
        if not missing:
            return
        if any(hasattr(layer.weight, "ds_id") for layer in layers):
            raise ValueError(
                "DeepSpeed ZeRO flattens the weights, so masks cannot hold; use DDP or FSDP2"
            )
        raise ValueError(
            f"the optimizer does not hold {few(missing)}; attach the optimizer "
            "that trains these weights, built after the model was moved or sharded, or exclude them"
        )


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
