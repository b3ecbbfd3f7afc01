"""The recipe entry ``movement``: prune what training moves towards zero."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from prunus.core.layers import Layer
from prunus.core.masks import local
from prunus.core.sharding import gather, scatter
from prunus.engine.layer_solve import measure
from prunus.engine.sequential.walk import SequentialResult
from prunus.engine.step import prune_step
from prunus.modifiers.base import MODIFIERS, Context
from prunus.modifiers.prune import PruningModifier
from prunus.modifiers.pruning_run import PruningRun
from prunus.pruners import Pruner
from prunus.pruners.movement import Movement


@dataclass(frozen=True)
class MovementPruning(PruningModifier):
    """Prune by scores summed up over the steps of training, from its first step on.

    Takes the memory of the weights once more until the last pruning step.
    """

    name: ClassVar[str] = "movement"
    one_shot: ClassVar[bool] = False

    pruner: Pruner = field(default_factory=Movement)
    """how the scores are used; there is one way"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.pruner, Movement):
            raise ValueError(
                f"pruner {self.pruner.name!r} goes into an entry 'prune'; drop it here"
            )
        if self.sequential or self.permute is not None:
            raise ValueError("sequential and permute mean nothing to movement pruning; drop them")

    def bind(self, context: Context) -> PruningRun:
        return MovementRun(self, context)


MODIFIERS.add(MovementPruning.name, MovementPruning)


class MovementRun(PruningRun):
    """Sums up ``-w * g`` before each step, while there is pruning to come."""

    def __init__(self, modifier: MovementPruning, context: Context) -> None:
        if context.one_shot:
            raise ValueError(
                "movement pruning watches training and has nothing to go by at once; attach the "
                "recipe to an optimizer, or use another pruner"
            )
        super().__init__(modifier, context)
        self.moved: dict[str, Tensor] = {}

    @torch.no_grad()
    def before_update(self, step: int) -> None:
        optimizer = self.context.optimizer
        found_inf, scale = (getattr(optimizer, key, None) for key in ("found_inf", "grad_scale"))
        if self.next == len(self.ticks) or (found_inf is not None and bool(found_inf)):
            return
        for layer in self.layers:
            gradient = layer.weight.grad
            if gradient is None:
                continue
            g = layer.part(local(gradient))
            g = g if scale is None else g / scale
            moved = self._moved(layer)
            moved.addcmul_(layer.local.to(moved.dtype), g.to(moved.dtype), value=-1)

    def _moved(self, layer: Layer) -> Tensor:
        if layer.name not in self.moved:
            # in single precision at least: sums of many small numbers
            dtype = torch.promote_types(layer.local.dtype, torch.float32)
            self.moved[layer.name] = torch.zeros_like(layer.local, dtype=dtype)
        return self.moved[layer.name]

    def _prune(self, target: float | None) -> SequentialResult:
        measured, shards = measure(self.method, self.layers, self.context.model, None)
        scores: dict[Any, Any] = {}
        for rows in measured.shares:
            moved = rows.layer.matrix(self._moved(rows.layer))
            scores[rows] = moved[rows.begin : rows.end]
        measured.held = (0, scores)
        what = self.method, self.layers, target, self.context.model, None
        changes = prune_step(*what, (measured, shards))
        if self.next == len(self.ticks):
            self.moved = {}
        return SequentialResult(changes=changes, rows=[change.row for change in changes])

    def state_dict(self) -> dict[str, Any]:
        weights = {layer.name: layer.weight for layer in self.layers}
        moved = {name: gather(t, weights[name]) for name, t in self.moved.items()}
        return {**super().state_dict(), "moved": moved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        weights = {layer.name: layer.weight for layer in self.layers}
        self.moved = {n: scatter(t, weights[n]).clone() for n, t in state["moved"].items()}
