"""The recipe entry ``acdc``: sparse and dense training in turn.

A. Peste, E. Iofinova, A. Vladu, D. Alistarh, "AC/DC: alternating compressed/decompressed training
of deep neural networks", 2021, https://arxiv.org/abs/2106.12379, algorithm 1.

Here the dense warm-up is whatever comes before the window, and the sparse fine-tuning whatever
comes after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from prunus.core.layers import Layer
from prunus.core.masks import local, packed, unpack
from prunus.core.sharding import gather, scatter
from prunus.modifiers.base import MODIFIERS, Context
from prunus.modifiers.optimizer_state import states_of
from prunus.modifiers.prune import PruningModifier
from prunus.modifiers.pruning_run import PruningRun
from prunus.modifiers.schedules import Schedule
from prunus.modifiers.state_checks import check_tensors

MOMENTA = ("momentum_buffer", "exp_avg")
"""names of the first moment in torch's optimizers"""


@dataclass(frozen=True)
class ACDC(PruningModifier):
    """Alternate dense phases with phases pruned to `sparsity`; the last phase is a pruned one.

    The window begins with a dense phase; ``every`` is the length of a phase. In a dense phase the
    pruned weights are trained again, from zero; not those that another entry has pruned.
    """

    name: ClassVar[str] = "acdc"

    reset_momentum: bool = True
    """zero the layers' momentum when weights come back: that of the pruned ones is stale"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.sparsity, Schedule):
            raise ValueError("each phase is pruned to the same sparsity; give a number")

    @property
    def at_once(self) -> bool:
        return False  # phases are steps of the window, as those of a schedule are

    def bind(self, context: Context) -> PruningRun:
        return ACDCRun(self, context)


MODIFIERS.add(ACDC.name, ACDC)


class ACDCRun(PruningRun):
    """A pruning run of whose ticks some lift the masks."""

    modifier: ACDC

    def __init__(self, modifier: PruningModifier, context: Context) -> None:
        super().__init__(modifier, context)
        self.others: dict[str, Tensor] = {}
        """layer name -> mask that another entry had put on, which dense phases leave on"""

    def _remember_others(self) -> None:
        masks = self.context.masks
        for layer in self.layers:
            mask = masks.of(layer)
            if mask is not None and not masks.owned(self, [layer]):
                self.others[layer.name] = mask.clone()

    def dense(self, tick: int) -> bool:
        """Whether the phase that begins with this tick is a dense one."""
        return tick % 2 == 0 and tick < len(self.ticks) - 2

    def _tick(self, tick: int, step: int) -> None:
        if not self.dense(tick):
            self._remember_others()
            super()._tick(tick, step)
            return
        context = self.context
        for layer in self.owned:
            if layer.name in self.others:
                context.masks.put(layer, self.others[layer.name], self)
            else:
                context.masks.lift(layer)
            if self.modifier.reset_momentum:
                self._reset_momentum(layer)
        self.next = tick + 1
        context.record({"event": "dense", "step": step, "layers": len(self.layers)})

    def _reset_momentum(self, layer: Layer) -> None:
        for state in states_of(self.context.optimizer, layer):
            for name in MOMENTA:
                if state.get(name) is not None:
                    layer.part(local(state[name])).zero_()

    def state_dict(self) -> dict[str, Any]:
        weights = {layer.name: layer.weight for layer in self.layers}
        others = {name: packed(gather(m, weights[name])) for name, m in self.others.items()}
        return {**super().state_dict(), "others": others}

    def check_state(self, state: dict[str, Any]) -> None:
        super().check_state(state)
        check_tensors("others", state.get("others", {}), self.layers)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        weights = {layer.name: layer.weight for layer in self.layers}
        self.others = {
            name: scatter(unpack(mask["bits"], mask["shape"]), weights[name])
            for name, mask in state.get("others", {}).items()  # older states have none
        }

    def timetable(self) -> list[tuple[int, str]]:
        return [
            (step, "dense" if self.dense(tick) else message)
            for tick, (step, message) in enumerate(super().timetable())
        ]
