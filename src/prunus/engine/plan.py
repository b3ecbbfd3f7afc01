"""What is pruned and how, whenever that may be: a method, its layers, the model and its data."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import nn

from prunus.allocators import Table
from prunus.calibration.calibration import Calibration, check_first_batch, first_pass
from prunus.calibration.measurements import Measurements, check_measurable
from prunus.core.layers import Layer
from prunus.core.masks import local
from prunus.core.ranks import Ranks
from prunus.core.selection import Selection
from prunus.core.sharding import shards_of
from prunus.engine.allocator_signals import signal_statistics
from prunus.engine.fitting import Misfits, fitting_layers, without_depthwise
from prunus.engine.layer_solve import plan_measurements
from prunus.engine.method import Method, misfits_message
from prunus.engine.permute.folds import FoldPlan
from prunus.engine.permute.step import Permute, permute_layers, plan_folds
from prunus.engine.sequential.options import Sequential
from prunus.engine.sequential.prune import NO_INPUTS, blocks_for, check_sequential, prune_blocks
from prunus.engine.sequential.walk import SequentialResult
from prunus.engine.step import check_reachable, prune_step, stage_count
from prunus.pruners import JointPruner

log = logging.getLogger("prunus")


@dataclass
class PruningPlan:
    """Everything about pruning but when; made once, checked, and pruned as often as is due.

    Raises ValueError for a method, a model and layers that do not go together.
    """

    method: Method
    selection: Selection
    model: nn.Module
    calibration: Calibration | None = None
    sequential: Sequential | None = None
    """how to go through the blocks; None if all layers are pruned together"""
    permute: Permute | None = None
    on_misfit: Misfits = "error"
    """what becomes of layers that the method cannot prune"""
    layers: list[Layer] = field(init=False)
    misfits: dict[str, str] = field(init=False)
    """layer name -> why it does not fit, and is left dense"""
    folds: FoldPlan = field(init=False)

    def __post_init__(self) -> None:
        self.selection = without_depthwise(self.method, self.selection)
        chosen = self.selection.layers
        self.layers, self.misfits = fitting_layers(self.method, chosen, self.on_misfit)
        if self.misfits:
            log.info("%s", misfits_message(self.misfits))
        shards_of(self.layers, self.method.pattern)  # raises for what no step could prune
        if self.sequential is not None:
            check_sequential(self.method, self.layers)
            blocks_for(self.model, self.sequential)
        self.folds = FoldPlan((), {})
        if self.permute is not None:
            self.folds = plan_folds(self.method, self.layers, self.model, self.permute)
        if isinstance(self.method.allocator, Table):  # now, not in the middle of training
            self.method.allocator.check([layer.name for layer in self.layers], self.misfits)

    @property
    def spared(self) -> dict[str, str]:
        """The layers that the default leaves dense, each with the reason."""
        return self.selection.spared

    @property
    def outside_blocks(self) -> list[str]:
        """Names of the layers that a sequential run prunes after all blocks."""
        if self.sequential is None:
            return []
        blocks = blocks_for(self.model, self.sequential)
        return [layer.name for layer in self.layers if blocks.owner(layer) is None]

    def check_data(self) -> None:
        """Raises ValueError if calibration data is needed and there is none."""
        if self.calibration is not None:
            return
        if self.sequential is not None:
            raise ValueError(NO_INPUTS)
        pruner, allocator = self.method.pruner, self.method.allocator
        check_measurable(self.measurements().stats, f"pruner {pruner.name!r}", None)
        signals = signal_statistics(allocator, self.layers)
        check_measurable(signals, f"allocator {allocator.name!r}", None)

    def try_data(self) -> None:
        """Raises ValueError if the first batch of the data cannot be used, where it is needed."""
        calibration = self.calibration
        if calibration is None:
            return
        stats = [*self.measurements().stats.values()]
        stats += signal_statistics(self.method.allocator, self.layers).values()
        if self.sequential is not None:  # the model may not fit where it would have to run
            if next(iter(calibration), None) is None:
                raise ValueError("calibration has no batches; at least one is needed")
        elif stats:
            gradients = any(stat.reads == "gradients" for stat in stats)
            check_first_batch(self.model, calibration, gradients)

    def check_reachable(self, target: float | None) -> None:
        """Raises ValueError if more is pruned already than the target asks for."""
        pattern = self.method.pattern
        if target is not None and pattern.fixed is None and not self.layers[0].weight.is_meta:
            check_reachable(self.layers, pattern, target)

    def prune(
        self, target: float | None, measured: tuple[Measurements, Ranks] | None = None
    ) -> SequentialResult:
        """One pruning step, committed, or nothing on failure.

        ``target`` is the sparsity of all layers together; None where the pattern or a table says
        it. ``measured`` are statistics that somebody else has measured.
        """
        what = self.method, self.layers, target, self.model, self.calibration
        if self.sequential is not None:
            return prune_blocks(*what, self.sequential, self.permute, self.folds.folds)
        done = SequentialResult()
        try:
            if self.permute is not None:
                args = self.method, self.layers, self.model, self.calibration
                done.folded = [permute_layers(*args, self.folds.folds, self.permute)]
                measured, done.folded[0].measured = done.folded[0].measured, None
            done.changes = prune_step(*what, measured)
        except BaseException:
            done.undo()
            raise
        done.rows = [change.row for change in done.changes]
        return done

    def measurements(self) -> Measurements:
        """What a pruning step measures, in how many passes over the calibration data."""
        return plan_measurements(self.method, self.layers, self.model, self.calibration)

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
        return {
            "masks": mask_bytes(self.layers),
            "statistics": self._statistics_bytes(self.measurements()),
            "a pruning step": sum(w.nbytes + w.numel() for w in weights),
        }

    def _statistics_bytes(self, measured: Measurements) -> int:
        if self.sequential is None:
            return measured.nbytes
        blocks, held = blocks_for(self.model, self.sequential), Counter[int | None]()
        for layer, stat in measured.stats.items():
            held[blocks.owner(layer)] += stat.nbytes
        return min(measured.nbytes, max(held.values(), default=0))


def first_pass_of(
    model: nn.Module, calibration: Calibration | None, sequential: Sequential | None
) -> Callable[[], object] | None:
    """A forward pass that shows the ends of the model; None where it had better not run whole."""
    elsewhere = sequential is not None and (sequential.device or sequential.weights)
    return None if elsewhere else first_pass(model, calibration)


def mask_bytes(layers: Sequence[Layer]) -> int:
    """Of the masks on this rank: of a third, that of the whole weight."""
    return sum({x.parameter_name: local(x.weight).numel() for x in layers}.values())
