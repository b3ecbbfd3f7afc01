"""What a recipe may contain: frozen modifiers that bind to a training run as live runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from prunus.calibration.calibration import Calibration
from prunus.core.extension import check_parts, check_settings
from prunus.core.fused_qkv import THIRDS
from prunus.core.layers import Layer
from prunus.core.masks import Hard, Masks
from prunus.core.names import Registry
from prunus.engine.sequential.walk import Sequential
from prunus.modifiers.timing import Timeline

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
    """layer, or third of one -> the run that keeps its mask: the one that pruned it last"""
    one_shot: bool = False
    sequential: Sequential | None = None
    """how to go through the blocks, where a recipe does not say it all"""

    def take(self, layer: Layer, run: object) -> None:
        """From now on the run keeps the layer's mask; whoever kept more keeps the other thirds."""
        whole, parts = _family(layer)
        if layer.qkv_part is None:
            for part in parts:
                self.owners.pop(part, None)
        elif whole in self.owners:
            self.owners.update(dict.fromkeys(parts, self.owners.pop(whole)))
        self.owners[layer.name] = run

    def owned(self, run: object, layers: Iterable[Layer]) -> list[Layer]:
        """The layers, or the thirds of them, whose masks the run keeps."""
        mine = []
        for layer in layers:
            if self.owners.get(layer.name) is run:
                mine.append(layer)
            elif layer.qkv_part is None:
                parts = enumerate(_family(layer)[1])
                held = [(i, name) for i, name in parts if self.owners.get(name) is run]
                mine += [replace(layer, name=name, qkv_part=i) for i, name in held]
        return mine

    def hide(self, run: object, layers: Iterable[Layer]) -> None:
        """Zero what is pruned in the layers whose masks the run keeps."""
        owned = self.owned(run, layers)
        masks = [layer.part(self.masks[layer.parameter_name]) for layer in owned]
        Hard().apply([layer.local for layer in owned], masks)

    def masked(self, layer: Layer) -> bool:
        """Whether runs keep the masks of all of the layer."""
        whole, parts = _family(layer)
        parts = parts if layer.qkv_part is None else [layer.name]
        return whole in self.owners or self.owners.keys() >= set(parts)

    def in_force(self, layer: Layer) -> Tensor | None:
        """The layer's keep-mask as it is now; None if its weight has none."""
        mask = self.masks.get(layer.parameter_name)
        return None if mask is None else layer.part(mask)


def _family(layer: Layer) -> tuple[str, list[str]]:
    """The names of the whole layer and of its thirds."""
    whole = layer.name if layer.qkv_part is None else layer.name[: -len("[q]")]
    return whole, [f"{whole}[{x}]" for x in THIRDS]


class Run:
    """A modifier at work. A step count is the number of optimizer steps done."""

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
        """After optimizer step number ``step``."""

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
_M = TypeVar("_M", bound=Modifier)


def register_modifier(cls: type[_M]) -> type[_M]:
    """Class decorator: make a modifier known by its ``name`` to recipes and the command line.

    `prune` leaves it out unless it says ``one_shot``. Raises ValueError if the class is not a
    frozen dataclass, lacks a part, or takes the name of another one.
    """
    check_settings(cls, "modifier", ("name", "one_shot"))
    own = getattr(cls, "bind", None) is not Modifier.bind
    check_parts(cls, Modifier, "modifier", ("name", "bind" if own else "bind(context)"))
    if not hasattr(cls, "one_shot"):
        cls.one_shot = False
    MODIFIERS.add(cls.name, cls)
    return cls
