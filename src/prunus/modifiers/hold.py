"""The recipe entry ``hold``: what is zero stays zero while the rest is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from prunus.masking import Hard, zero_momentum
from prunus.modifiers.base import MODIFIERS, Context, Run
from prunus.modifiers.pruning_run import check_held
from prunus.selection import select
from prunus.timing import Window


@dataclass(frozen=True)
class Hold:
    """Fine-tune a sparse model: the zeros it has when the window begins are its mask.

    Prunes nothing. What other entries prune later is theirs.
    """

    name: ClassVar[str] = "hold"
    one_shot: ClassVar[bool] = False

    layers: tuple[str, ...] | None = ("*",)
    """names, globs, class names or `re:` regexes; default: all, the stem and the head too"""
    exclude: tuple[str, ...] = ()
    """what to leave out of `layers`"""
    window: Window | None = None
    """when it begins; default: before the first step. There is no end"""

    def __post_init__(self) -> None:
        if self.window is not None and (self.window.to or self.window.every):
            raise ValueError("zeros are held until the session closes; drop 'to' and 'every'")

    def bind(self, context: Context) -> Run:
        return HoldRun(self, context)


MODIFIERS.add(Hold.name, Hold)


class HoldRun(Run):
    """Takes the masks before the step that would move the zeros, and applies them after each."""

    def __init__(self, modifier: Hold, context: Context) -> None:
        self.context = context
        self.layers = select(context.model, modifier.layers, modifier.exclude).layers
        self.names = [layer.parameter_name for layer in self.layers]
        if context.optimizer is not None:
            check_held(context.optimizer, self.layers)
        self.begin = (modifier.window or Window()).begin(context.timeline)
        self.held = False

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        if self.held or step < self.begin:
            return
        self.held = True
        zeros = size = 0
        for layer in self.layers:
            weight, mask = layer.weight, layer.local != 0
            self.context.masks.put(layer.parameter_name, weight, mask)
            self.context.owners[layer.parameter_name] = self
            if self.context.optimizer is not None:
                zero_momentum(self.context.optimizer, weight, mask)
            zeros, size = zeros + int((~mask).sum()), size + mask.numel()
        sparsity = zeros / max(1, size)
        self.context.record({"event": "hold", "step": step, "sparsity": sparsity})

    def after_step(self, step: int) -> None:
        owned = [name for name in self.names if self.context.owners.get(name) is self]
        Hard().hide(*self.context.masks.parts(owned), 1.0)

    def plan(self) -> list[tuple[int, str]]:
        return [(self.begin, f"hold the zeros of {len(self.layers)} layers")]

    def state_dict(self) -> dict[str, Any]:
        owned = [name for name in self.names if self.context.owners.get(name) is self]
        return {"held": self.held, "owned": owned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.held = bool(state["held"])
        for name in state["owned"]:
            self.context.owners[name] = self
