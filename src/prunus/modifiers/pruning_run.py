"""The recipe entry ``prune`` at work."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any, ClassVar, Protocol

from torch import nn

from prunus.calibration.calibration import Calibration
from prunus.core.layers import Layer
from prunus.engine.method import LayerResult
from prunus.engine.permute.step import Permute
from prunus.engine.plan import PruningPlan
from prunus.engine.sequential.walk import SequentialResult
from prunus.modifiers.base import Context, Run, log
from prunus.modifiers.events import pruning_event
from prunus.modifiers.schedules import Schedule
from prunus.modifiers.state_checks import check_counts, check_fields
from prunus.modifiers.timing import Window


class Pruning(Protocol):
    """What a run needs to know of its modifier."""

    @property
    def permute(self) -> Permute | None: ...
    @property
    def pattern(self) -> str: ...
    @property
    def window(self) -> Window | None: ...
    @property
    def schedule(self) -> Schedule | None: ...
    @property
    def at_once(self) -> bool: ...
    @property
    def final_sparsity(self) -> float | None: ...
    def plan(self, model: nn.Module, calibration: Calibration | None = None) -> PruningPlan: ...


class PruningRun(Run):
    """Prunes at its ticks and keeps the masks of its weights in between."""

    prunes: ClassVar[bool] = True
    pruning: PruningPlan

    def __init__(self, modifier: Pruning, context: Context) -> None:
        self.modifier, self.context = modifier, context
        if modifier.permute is not None:
            raise ValueError(
                "permute moves weights, which an optimizer knows by their places; "
                "permute and prune the finished model, then train what is left"
            )
        self.pruning = modifier.plan(context.model, context.calibration)
        self.layers: list[Layer] = self.pruning.layers
        self.spared, self.misfits = self.pruning.spared, self.pruning.misfits
        context.check_held(self.layers)
        self.ticks = self._ticks()
        total = context.timeline.total
        if total is not None and self.ticks[-1] > total:
            log.warning(
                "last pruned after step %d, but training ends after step %d: "
                "closing the session then prunes to the target at once",
                self.ticks[-1],
                total,
            )
        self.next = 0
        """number of the first tick that is still to be done"""
        self.rows: list[LayerResult] = []
        """what became of the layers in the last pruning step"""

    def _ticks(self) -> list[int]:
        window, timeline = self.modifier.window or Window(), self.context.timeline
        return [window.begin(timeline)] if self.modifier.at_once else window.ticks(timeline)

    def check_data(self) -> None:
        self.pruning.check_data()
        self.pruning.try_data()

    def start(self) -> None:
        self.pruning.check_reachable(self.modifier.final_sparsity)

    def target(self, tick: int) -> float | None:
        """Sparsity after the tick of this number."""
        schedule = self.modifier.schedule
        if schedule is None or tick == len(self.ticks) - 1:
            return self.modifier.final_sparsity
        begin, end = self.ticks[0], self.ticks[-1]
        cycle = schedule.cycle and self.context.timeline.cycle(schedule.cycle, end - begin)
        return schedule((self.ticks[tick] - begin) / (end - begin), cycle or None)

    @property
    def owned(self) -> list[Layer]:
        """The layers, or thirds of them, whose masks this run keeps on."""
        return self.context.masks.owned(self, self.layers)

    def apply_masks(self, step: int) -> None:
        self.context.apply_masks(self)

    def prune(self, step: int) -> None:
        due = bisect_right(self.ticks, step)
        if due > self.next:
            self._tick(due - 1, step)  # of several that are due, the last says it all

    @property
    def span(self) -> tuple[float, float]:
        """Steps of the first and the last pruning; what is due at 0 happens after the first."""
        return max(1, self.ticks[0]), max(1, self.ticks[-1])

    @property
    def due(self) -> int | None:
        return self.ticks[-1] if self.next < len(self.ticks) else None

    def next_change(self, step: int) -> int | None:
        return max(step, self.ticks[self.next]) if self.next < len(self.ticks) else None

    def finish(self, step: int) -> None:
        if self.next < len(self.ticks):
            self._tick(len(self.ticks) - 1, step)

    def _tick(self, tick: int, step: int) -> None:
        """What is due with the tick of this number, which stays due if that raises."""
        target = self.target(tick)
        result = self._pruned(target)
        for change in result.changes:
            self.context.mask(self, change.layer, change.mask)
        self.next, self.rows = tick + 1, result.rows
        method = self.pruning.method.pruner.name, self.modifier.pattern
        self.context.record(pruning_event(*method, self.rows, step, target, self.misfits))

    def _pruned(self, target: float | None) -> SequentialResult:
        return self.pruning.prune(target)

    def timetable(self) -> list[tuple[int, str]]:
        fixed = self.pruning.method.pattern.fixed
        targets = [
            (step, fixed if fixed is not None else self.target(i))
            for i, step in enumerate(self.ticks)
        ]
        method = f"{self.pruning.method.pruner.name} to {self.modifier.pattern}"
        return [
            (s, f"{method}, sparsity {'by table' if t is None else f'{t:.4f}'}") for s, t in targets
        ]

    def memory(self) -> dict[str, int]:
        return self.pruning.memory()

    def state_dict(self) -> dict[str, Any]:
        owned = [layer.name for layer in self.owned]
        return {"next": self.next, "owned": owned, "ticks": self.ticks}

    def check_state(self, state: dict[str, Any]) -> None:
        check_fields(state, next=int, owned=list, ticks=list)
        check_counts("ticks", state["ticks"])
        if state["next"] > len(state["ticks"]):
            raise ValueError(f"next={state['next']} of {len(state['ticks'])} pruning steps")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["ticks"] != self.ticks:
            log.warning(
                "resuming with pruning after steps %s; it was after %s: are steps_per_epoch and "
                "epochs the same?",
                self.ticks,
                state["ticks"],
            )
        self.next = min(state["next"], len(self.ticks))
        self.context.masks.own(self, self.layers, state["owned"])
