"""One walk through the blocks of a model: read, permute, prune, write, carry on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from prunus.calibration.calibration import Calibration
from prunus.core.layers import Layer
from prunus.core.names import few
from prunus.core.progress import Bar
from prunus.core.ranks import all_ranks
from prunus.core.wrappers import unwrap
from prunus.engine.method import LayerResult, LayerUpdate, Method
from prunus.engine.permute.folds import Fold
from prunus.engine.permute.step import PermutationResult, Permute, permute_layers
from prunus.engine.sequential.access import Walk
from prunus.engine.sequential.options import Sequential as Sequential
from prunus.engine.sequential.record import BlockInput
from prunus.engine.sequential.replay import advance, as_calibration
from prunus.engine.sequential.resume import (
    FinishedBlocks,
    Record,
    Sums,
    copy_into,
    sums_of,
    tensors_of,
)
from prunus.engine.step import commit, prune_step

log = logging.getLogger("prunus")


@dataclass
class SequentialResult:
    """What became of the blocks."""

    changes: list[LayerUpdate] = field(default_factory=list)
    rows: list[LayerResult] = field(default_factory=list)
    folded: list[PermutationResult] = field(default_factory=list)
    taken: list[Callable[[], None]] = field(default_factory=list)
    """put back what was loaded from the folder"""
    outside: list[str] = field(default_factory=list)
    """layers that are in no block, pruned together when all blocks were"""

    def undo(self) -> None:
        commit(self.changes[::-1])
        for folded in reversed(self.folded):
            folded.undo()
        for take_back in reversed(self.taken):
            take_back()


class BlockPruning:
    """One walk through the blocks."""

    def __init__(
        self,
        walk: Walk,
        method: Method,
        target: float | None,
        permute: Permute,
        folds: Sequence[Fold],
    ) -> None:
        self.walk, self.method, self.target = walk, method, target
        self.permute, self.folds, self.result = permute, folds, SequentialResult()
        self.items: list[BlockInput] = []
        self.finished: FinishedBlocks | None = None

    def run(self) -> SequentialResult:
        walk = self.walk
        try:
            self._permute_across()
            for numbers, self.items in walk.lists():
                self._open()
                self._list(numbers)
            self._open()
            self._rest()
            if self.finished is not None:
                self.finished.close(unwrap(walk.model), walk.blocks)
        except BaseException:
            self.result.undo()
            raise
        return self.result

    def _open(self) -> None:
        """Open the folder, once it is known what the first block is given."""
        walk = self.walk
        if walk.how.folder is not None and self.finished is None:
            self.finished = FinishedBlocks(walk.how.folder, self._identity(self.items))
            walk.finished = self.finished

    def _list(self, numbers: range) -> None:
        count = len(numbers)
        bar = Bar(f"block 1 of {count}", count)
        try:
            for i, number in enumerate(numbers):
                bar.step(i, f"block {i + 1} of {count}{self._said()}")
                self._block(number, i, last=i + 1 == count)
        finally:
            bar.close()

    def _rest(self) -> None:
        """Prune what is in no block, on the inputs that it has in the pruned model."""
        walk = self.walk
        layers = walk.outside
        if not layers:
            return
        self.result.outside = [layer.name for layer in layers]
        log.info(
            "sequential: %s in no block, pruned when all blocks were", few(self.result.outside)
        )
        with walk.within_reach():
            changes, _ = self._step(walk.model, layers, walk.calibration)
        self.result.rows += [change.row for change in changes]
        if walk.weights is None:
            self.result.changes += changes

    def _permute_across(self) -> None:
        """Folds that reach over several blocks come first, on the model as it is."""
        walk = self.walk
        across: list[Fold] = []
        within: list[Fold] = []
        for fold in self.folds:
            numbers = {walk.blocks.number_of(name) for name in fold.names}
            (within if len(numbers) == 1 else across).append(fold)
        self.folds = within
        if across and walk.how.folder is not None:
            raise ValueError(
                f"permute: {across[0].name} reaches over several blocks, which a folder takes one "
                "at a time; use shared: leave, exclude its layers, or use no folder"
            )
        if across:
            what = self.method, walk.everything, walk.model, walk.calibration
            with walk.within_reach():
                self.result.folded.append(permute_layers(*what, across, self.permute))
            self.result.folded[-1].measured = None  # of the dense model

    def _identity(self, items: Sequence[BlockInput]) -> dict[str, str]:
        """What must be the same for a run to go on from the blocks of another one."""
        total = sum(float(item.stream.double().sum()) for item in items)
        counted = torch.tensor([len(items), total], dtype=torch.float64)
        count, total = all_ranks().all_reduce(counted).tolist()
        layers = [layer.name for layer in self.walk.everything]
        unreached = self.method.unreached
        last = "" if unreached == "error" else f", unreached: {unreached}"
        return {
            "settings": f"{self.method}, {self.target}, {self.permute if self.folds else ''}{last}",
            "layers": f"{self.walk.blocks.name}: {', '.join(layers)}",
            "calibration data": f"{count:.0f} batches, {total:.6e}",
        }

    def _said(self) -> str:
        if not self.result.rows:
            return ""
        row = self.result.rows[-1]
        error = "" if row.error is None else f", error {row.error:.3g}"
        return f"; {row.name}: sparsity {row.sparsity:.3f}{error}"

    def _block(self, number: int, place: int, last: bool) -> None:
        """Prune the block of this number, which has this place in its list."""
        walk = self.walk
        with walk.block(number) as block:
            layers = walk.layers.get(number, [])
            dense = {} if self.finished is None else sums_of(layers)
            if self.finished is not None and self.finished.has(number):
                changes = self._take(block, number, self.finished, dense)
            else:
                data = as_calibration(self.items, place, walk.calibration.memory)
                changes = self._prune(block, number, data, dense)
            if not last:
                advance(block, self.items, place)
        for change in changes:  # the block is back at home
            home = change.layer.local.device
            change.weight, change.mask = change.weight.to(home), change.mask.to(home)

    def _take(
        self, block: nn.Module, number: int, finished: FinishedBlocks, dense: Sums
    ) -> list[LayerUpdate]:
        """Load the block, which was pruned before."""
        in_memory = self.walk.weights is None
        layers = {layer.name: layer for layer in self.walk.layers.get(number, [])}
        if in_memory:
            old = {name: t.detach().clone() for name, t in tensors_of(block).items()}
            self.result.taken.append(lambda: copy_into(block, old))
        # whoever undoes a change swaps it with what was loaded, so this is a copy of its own
        before = {name: x.local.clone() for name, x in layers.items() if in_memory}
        record = finished.load(number, self.walk.blocks.name_of(number), block, dense)
        self.result.rows += record.rows
        self.result.folded.append(record.folded)
        rows = record.rows if in_memory else []
        changes = [
            LayerUpdate(layers[x.name], before[x.name], layers[x.name].local != 0, x) for x in rows
        ]
        self.result.changes += changes
        return changes

    def _prune(
        self, block: nn.Module, number: int, data: Calibration, dense: Sums
    ) -> list[LayerUpdate]:
        layers, name = self.walk.layers.get(number, []), self.walk.blocks.name_of(number)
        changes, folded = list[LayerUpdate](), PermutationResult()
        if layers:
            changes, folded = self._step(block, layers, data)
        rows = [change.row for change in changes]
        self.result.rows += rows
        if self.walk.weights is not None:
            changes = []  # the block goes back to what it was read from
        self.result.changes += changes
        if self.finished is not None:
            self.finished.put(number, name, block, Record.of(dense, rows, folded))
        return changes

    def _step(
        self, module: nn.Module, layers: Sequence[Layer], data: Calibration
    ) -> tuple[list[LayerUpdate], PermutationResult]:
        """Permute and prune the layers of a module, committed."""
        folded = permute_layers(self.method, layers, module, data, self.folds, self.permute)
        if self.walk.weights is None:
            self.result.folded.append(folded)
        changes = prune_step(self.method, layers, self.target, module, data, folded.measured)
        folded.measured = None
        if self.walk.weights is not None:
            self.result.folded.append(PermutationResult(folded.rows, folded.refused))
        return changes, folded
