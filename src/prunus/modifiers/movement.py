"""The recipe entry ``movement``: prune what training moves towards zero."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from prunus.calibration.gradient_checks import ZERO_GRADIENTS
from prunus.calibration.memory_plan import Rows
from prunus.core.layers import Layer
from prunus.core.masks import local
from prunus.core.ranks import all_ranks
from prunus.core.sharding import gather, scatter
from prunus.engine.layer_solve import measure
from prunus.engine.sequential.walk import SequentialResult
from prunus.modifiers.base import MODIFIERS, Context
from prunus.modifiers.grad_scaler import gradient_scale, step_is_skipped
from prunus.modifiers.prune import PruningModifier
from prunus.modifiers.pruning_run import PruningRun
from prunus.modifiers.state_checks import check_fields, check_tensors
from prunus.pruners import Pruner
from prunus.pruners.movement import Movement
from prunus.stats import Statistic
from prunus.stats.movement import MovementSum


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
        super().__init__(modifier, context)
        self.moved: dict[str, Tensor] = {}

    @torch.no_grad()
    def before_update(self, step: int) -> None:
        optimizer = self.context.optimizer
        if self.next == len(self.ticks) or step_is_skipped(optimizer):
            return
        scale = gradient_scale(optimizer)
        for layer in self.layers:
            gradient = layer.weight.grad
            if gradient is None:
                continue
            g, moved = layer.part(local(gradient)), self._sum(layer)
            moved.addcmul_(layer.local.to(moved.dtype), g.to(moved.dtype), value=-1 / scale)
            self.moved[layer.name] = moved

    def _sum(self, layer: Layer) -> Tensor:
        """What has been summed up for the layer; zeros, which nobody keeps, before the first."""
        if layer.name in self.moved:
            return self.moved[layer.name]
        # in single precision at least: sums of many small numbers
        dtype = torch.promote_types(layer.local.dtype, torch.float32)
        return torch.zeros_like(layer.local, dtype=dtype)

    def _pruned(self, target: float | None) -> SequentialResult:
        method = self.pruning.method
        measured, ranks = measure(method, self.layers, self.context.model, None)
        sums: dict[Rows, Statistic] = {}
        for rows in measured.shares:
            moved = rows.layer.matrix(self._sum(rows.layer))
            sums[rows] = MovementSum(moved[rows.begin : rows.end])
        measured.fill(sums, self._unmoved())
        return self.pruning.prune(target, (measured, ranks))

    def _unmoved(self) -> dict[Layer, str]:
        """Layers that no step has moved on any rank, and a clause that says how that is."""
        nonzero = [int(self._sum(layer).count_nonzero()) for layer in self.layers]
        counts = all_ranks().all_reduce(torch.tensor(nonzero)).tolist()
        still = [x for x, count in zip(self.layers, counts, strict=True) if count == 0]
        never = "no step of training has a gradient of"
        return {x: ZERO_GRADIENTS if x.name in self.moved else never for x in still}

    def _tick(self, tick: int, step: int) -> None:
        super()._tick(tick, step)
        if self.next == len(self.ticks):
            self.moved = {}

    def state_dict(self) -> dict[str, Any]:
        weights = {layer.name: layer.weight for layer in self.layers}
        moved = {name: gather(t, weights[name]) for name, t in self.moved.items()}
        return {**super().state_dict(), "moved": moved}

    def check_state(self, state: dict[str, Any]) -> None:
        super().check_state(state)
        check_fields(state, moved=dict)
        check_tensors("moved", state["moved"], self.layers)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        weights = {layer.name: layer.weight for layer in self.layers}
        self.moved = {n: scatter(t, weights[n]).clone() for n, t in state["moved"].items()}
