"""The recipe entry ``prune`` at work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from prunus.allocators import Table
from prunus.calibration.measurements import Measurements, check_measurable
from prunus.core.blocks import by_block
from prunus.core.layers import Layer
from prunus.core.masks import local, zero_momentum
from prunus.core.selection import select
from prunus.core.sharding import shards_of
from prunus.engine.allocator_signals import signal_statistics
from prunus.engine.layer_solve import plan_measurements
from prunus.engine.method import LayerResult
from prunus.engine.permute.folds import Plan
from prunus.engine.permute.step import permute_layers, plan_folds
from prunus.engine.sequential.prune import NO_INPUTS, blocks_for, check_sequential, prune_blocks
from prunus.engine.sequential.walk import SequentialResult
from prunus.engine.step import check_reachable, prune_step, stage_count
from prunus.modifiers.base import Context, Run, log
from prunus.modifiers.events import layers_event
from prunus.modifiers.timing import Window
from prunus.pruners import JointPruner

if TYPE_CHECKING:
    from prunus.modifiers.prune import PruningModifier


class PruningRun(Run):
    """Prunes at its ticks and keeps the masks of its weights in between."""

    def __init__(self, modifier: PruningModifier, context: Context) -> None:
        self.modifier, self.context, self.method = modifier, context, modifier.method
        chosen = select(context.model, modifier.layers, modifier.exclude)
        self.layers: list[Layer] = self.method.fit(chosen.layers)
        self.left_dense = chosen.left_dense
        if context.optimizer is not None:
            check_held(context.optimizer, self.layers)
        shards_of(self.layers, self.method.pattern)  # raises for what no step could prune
        walk = modifier.walk(context)
        if walk is not None:
            check_sequential(self.method, self.layers)
            blocks_for(context.model, self.layers, walk)
        self.folds = self._folds()
        if isinstance(self.method.allocator, Table):  # now, not in the middle of training
            self.method.allocator.rates([layer.name for layer in self.layers])
        self.ticks = [0] if context.one_shot else self._ticks()
        total = context.timeline.total
        if total is not None and self.ticks[-1] > total:
            log.warning(
                "last pruned after step %d, but training ends after step %d: "
                "closing the session then prunes to the target at once",
                self.ticks[-1],
                total,
            )
        self.next = 0
        self.result = SequentialResult()

    def _folds(self) -> Plan:
        permute = self.modifier.permute
        if permute is None:
            return Plan((), {})
        if not self.context.one_shot:
            raise ValueError(
                "permute moves weights, which an optimizer knows by their places; "
                "permute and prune the finished model, then train what is left"
            )
        return plan_folds(self.method, self.layers, self.context.model, permute)

    def _ticks(self) -> list[int]:
        window, timeline = self.modifier.window or Window(), self.context.timeline
        return [window.begin(timeline)] if self.modifier.at_once else window.ticks(timeline)

    def check_data(self) -> None:
        context, method = self.context, self.method
        if context.calibration is not None:
            return
        if self.modifier.walk(context) is not None:
            raise ValueError(NO_INPUTS)
        measured = plan_measurements(method, self.layers, context.model, None)
        check_measurable(measured.stats, f"pruner {method.pruner.name!r}", None)
        signals = signal_statistics(method.allocator, self.layers)
        check_measurable(signals, f"allocator {method.allocator.name!r}", None)

    def start(self) -> None:
        schedule, pattern = self.modifier.schedule, self.method.pattern
        if schedule is None or pattern.fixed is not None or self.layers[0].weight.is_meta:
            return
        check_reachable(self.layers, pattern, schedule.final)

    def target(self, tick: int) -> float | None:
        """Sparsity after the tick of this number."""
        schedule = self.modifier.schedule
        if schedule is None or tick == len(self.ticks) - 1:
            return None if schedule is None else schedule.final
        begin, end = self.ticks[0], self.ticks[-1]
        cycle = schedule.cycle and self.context.timeline.cycle(schedule.cycle, end - begin)
        return schedule((self.ticks[tick] - begin) / (end - begin), cycle or None)

    @property
    def owned(self) -> list[Layer]:
        """The layers, or thirds of them, whose masks this run keeps."""
        return self.context.owned(self, self.layers)

    def apply_masks(self, step: int) -> None:
        self.context.hide(self, self.layers)

    def prune(self, step: int) -> None:
        if self.next < len(self.ticks) and step >= self.ticks[self.next]:
            while self.next < len(self.ticks) and step >= self.ticks[self.next]:
                self.next += 1  # of several that are due, the last says it all
            self._tick(self.next - 1, step)

    @property
    def span(self) -> tuple[int, int]:
        """Steps of the first and the last pruning; what is due at 0 happens after the first."""
        return max(1, self.ticks[0]), max(1, self.ticks[-1])

    @property
    def due(self) -> int | None:
        return self.ticks[-1] if self.next < len(self.ticks) else None

    def next_change(self, step: int) -> int | None:
        return max(step, self.ticks[self.next]) if self.next < len(self.ticks) else None

    def finish(self, step: int) -> None:
        if self.next < len(self.ticks):
            self.next = len(self.ticks)
            self._tick(self.next - 1, step)

    def _tick(self, tick: int, step: int) -> None:
        context, target = self.context, self.target(tick)
        self.result = self._prune(target)
        changes = self.result.changes
        for change in changes:
            put_mask(context, self, change.layer, change.mask)
        if not context.one_shot:
            self.result.changes = []
        context.record(pruning_event(self.modifier, self.rows, step, target))

    def _prune(self, target: float | None) -> SequentialResult:
        context, modifier = self.context, self.modifier
        what = self.method, self.layers, target, context.model, context.calibration
        walk, permute = modifier.walk(context), modifier.permute
        if walk is not None:
            return prune_blocks(*what, walk, permute, self.folds.folds)
        done = SequentialResult()
        try:
            measured = None
            if permute is not None:
                args = self.method, self.layers, context.model, context.calibration
                done.folded = [permute_layers(*args, self.folds.folds, permute)]
                measured, done.folded[0].measured = done.folded[0].measured, None
            done.changes = prune_step(*what, measured)
        except BaseException:
            done.undo()
            raise
        done.rows = [change.row for change in done.changes]
        return done

    @property
    def rows(self) -> list[LayerResult]:
        """What became of the layers in the last pruning step."""
        return self.result.rows

    def plan(self) -> list[tuple[int, str]]:
        fixed = self.method.pattern.fixed
        targets = [
            (step, fixed if fixed is not None else self.target(i))
            for i, step in enumerate(self.ticks)
        ]
        method = f"{self.method.pruner.name} to {self.modifier.pattern}"
        return [
            (s, f"{method}, sparsity {'by table' if t is None else f'{t:.4f}'}") for s, t in targets
        ]

    def measurements(self) -> Measurements:
        """What a pruning step measures, in how many passes over the calibration data."""
        context = self.context
        return plan_measurements(self.method, self.layers, context.model, context.calibration)

    def passes(self) -> int:
        """Readings of the calibration data in a pruning step.

        All groups of statistics are measured for the scores, and but the last again to rebuild.
        """
        groups = len(self.measurements().groups)
        once = groups if isinstance(self.method.pruner, JointPruner) else 2 * groups - 1
        return once * stage_count(self.method)

    def memory(self) -> dict[str, int]:
        """Bytes beyond the model: always, for data, and while a pruning step runs."""
        weights = [layer.local for layer in self.layers]
        measured = self.measurements()
        statistics = measured.nbytes
        if (walk := self.modifier.walk(self.context)) is not None:  # of one block at a time
            blocks = by_block(blocks_for(self.context.model, self.layers, walk), self.layers)
            each = (sum(measured.stats[x].nbytes for x in b if x in measured.stats) for b in blocks)
            statistics = min(statistics, max(each))
        return {
            "masks": mask_bytes(self.layers),
            "statistics": statistics,
            "a pruning step": sum(w.nbytes + w.numel() for w in weights),
        }

    def state_dict(self) -> dict[str, Any]:
        owned = [layer.name for layer in self.owned]
        return {"next": self.next, "owned": owned, "ticks": self.ticks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["ticks"] != self.ticks:
            log.warning(
                "resuming with pruning after steps %s; it was after %s: are steps_per_epoch and "
                "epochs the same?",
                self.ticks,
                state["ticks"],
            )
        self.next = int(state["next"])
        for name in state["owned"]:
            self.context.owners[name] = self


def put_mask(context: Context, run: Run, layer: Layer, mask: Tensor) -> None:
    """A layer's mask, from now on kept by the run; the momentum of what it prunes is zeroed."""
    part = None if layer.qkv_part is None else layer.part
    context.masks.put(layer.parameter_name, layer.weight, mask, part)
    context.take(layer, run)
    if context.optimizer is not None:
        whole = context.masks[layer.parameter_name]
        zero_momentum(context.optimizer, layer.weight, layer.part(whole), layer.part)


def mask_bytes(layers: list[Layer]) -> int:
    """Of the masks on this rank: of a third, that of the whole weight."""
    return sum({x.parameter_name: local(x.weight).numel() for x in layers}.values())


def pruning_event(
    modifier: PruningModifier, rows: list[LayerResult], step: int, target: float | None
) -> dict[str, Any]:
    """What records and reports know of one pruning step."""
    return layers_event(modifier.pruner.name, modifier.pattern, rows, step, target)


def check_held(optimizer: Any, layers: list[Layer]) -> None:
    """Raises ValueError unless the optimizer holds every weight that will be pruned."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [layer.parameter_name for layer in layers if id(layer.weight) not in held]
    if not missing:
        return
    if any(hasattr(layer.weight, "ds_id") for layer in layers):
        raise ValueError(
            "DeepSpeed ZeRO flattens the weights, so masks cannot hold; use DDP or FSDP2"
        )
    count = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    raise ValueError(
        f"the optimizer does not hold {', '.join(missing[:3])}{count}; attach the optimizer that "
        "trains these weights, built after the model was moved or sharded, or exclude them"
    )
