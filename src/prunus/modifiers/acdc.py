"""The recipe entry ``acdc``: sparse and dense training in turn.

A. Peste, E. Iofinova, A. Vladu, D. Alistarh, "AC/DC: alternating compressed/decompressed training
of deep neural networks", 2021, https://arxiv.org/abs/2106.12379, algorithm 1.

Here the dense warm-up is whatever comes before the window, and the sparse fine-tuning whatever
comes after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prunus.core.layers import Layer
from prunus.core.masks import local
from prunus.modifiers.base import MODIFIERS, Context
from prunus.modifiers.prune import PruningModifier
from prunus.modifiers.pruning_run import PruningRun
from prunus.modifiers.schedules import Schedule

MOMENTA = ("momentum_buffer", "exp_avg")
"""names of the first moment in torch's optimizers"""


@dataclass(frozen=True)
class ACDC(PruningModifier):
    """Alternate dense phases with phases pruned to `sparsity`; the last phase is a pruned one.

    The window begins with a dense phase; ``every`` is the length of a phase. In a dense phase the
    pruned weights are trained again, from zero.
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

    def dense(self, tick: int) -> bool:
        """Whether the phase that begins with this tick is a dense one."""
        return tick % 2 == 0 and tick < len(self.ticks) - 2

    def _tick(self, tick: int, step: int) -> None:
        if not self.dense(tick):
            super()._tick(tick, step)
            return
        context = self.context
        for layer in self.owned:
            context.masks.lift(layer)
            if self.modifier.reset_momentum:
                self._reset_momentum(layer)
        self.next = tick + 1
        context.record({"event": "dense", "step": step, "layers": len(self.layers)})

    def _reset_momentum(self, layer: Layer) -> None:
        state = self.context.optimizer.state.get(layer.weight, {})
        for name in MOMENTA:
            if state.get(name) is not None:
                layer.part(local(state[name])).zero_()

    def timetable(self) -> list[tuple[int, str]]:
        return [
            (step, "dense" if self.dense(tick) else message)
            for tick, (step, message) in enumerate(super().timetable())
        ]
