"""One walk through the blocks of a model: read, permute, prune, write, carry on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from prunus.block_inputs import Item, advance, as_calibration, record
from prunus.blocks import Blocks
from prunus.calibration import Calibration
from prunus.engine import commit, prune_step
from prunus.finished_blocks import FinishedBlocks, put_back
from prunus.layers import Layer, unwrap
from prunus.lazy_weights import Weights, materialize, release
from prunus.method import Change, LayerRow, Method
from prunus.permute.folds import Fold
from prunus.permuting import Folded, Permute, permute_layers
from prunus.progress import Bar


@dataclass(frozen=True)
class Sequential:
    """How to prune block by block, and where the blocks are meanwhile."""

    blocks: str | None = None
    """name of the list of blocks, as `model.layers`; default: the one with the most weights"""
    device: str | None = None
    """where the block is that is worked on; default: where the model is"""
    weights: str | None = None
    """a safetensors file, or a folder of them: for a model on the meta device, of which one block
    at a time is read; needs `folder`"""
    folder: str | None = None
    """where each finished block is written; a run that was killed goes on from there"""

    def __post_init__(self) -> None:
        if self.weights is not None and self.folder is None:
            raise ValueError(
                "sequential: weights are read block by block; say in which folder to "
                "write the pruned ones, as folder='pruned'"
            )


@dataclass
class Walked:
    """What became of the blocks."""

    changes: list[Change] = field(default_factory=list)
    rows: list[LayerRow] = field(default_factory=list)
    folded: list[Folded] = field(default_factory=list)
    taken: list[Callable[[], None]] = field(default_factory=list)
    """put back what was loaded from the folder"""

    def undo(self) -> None:
        commit(self.changes[::-1])
        for folded in reversed(self.folded):
            folded.undo()
        for take_back in reversed(self.taken):
            take_back()


@dataclass
class Walk:
    """The blocks of a model, and how to get at one of them at a time."""

    model: nn.Module
    calibration: Calibration
    blocks: Blocks
    layers: Mapping[int, Sequence[Layer]]
    how: Sequential
    weights: Weights | None

    def items(self) -> list[Item]:
        with self.block(0, at_home=True):
            return record(self.model, self.blocks, self.calibration)

    @contextlib.contextmanager
    def block(self, number: int, at_home: bool = False) -> Iterator[nn.Module]:
        """The block, read from disk and moved to where it is worked on, and back again."""
        block, filled = self.blocks.modules[number], []
        if self.weights is not None:
            filled = materialize(block, self.blocks.name_of(number), self.weights)
        home = next(block.parameters()).device
        try:
            yield block if at_home or self.how.device is None else block.to(self.how.device)
        finally:
            block.to(home)
            release(filled)


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
        self.permute, self.folds, self.did = permute, folds, Walked()

    def run(self) -> Walked:
        walk, count = self.walk, len(self.walk.blocks)
        bar = Bar(f"block 1 of {count}", count)
        try:
            self._permute_across()
            self.items = walk.items()
            folder = walk.how.folder
            self.finished = None if folder is None else FinishedBlocks(folder, self._identity())
            for number in range(count):
                bar.step(number, f"block {number + 1} of {count}{self._said()}")
                self._block(number)
            if self.finished is not None:
                self.finished.close(unwrap(walk.model), walk.blocks)
        except BaseException:
            self.did.undo()
            raise
        finally:
            bar.close()
        return self.did

    def _permute_across(self) -> None:
        """Folds that reach over several blocks come first, on the model as it is."""
        walk = self.walk
        numbers = [{walk.blocks.number_of(r.name) for r in fold.readers} for fold in self.folds]
        across = [f for f, blocks in zip(self.folds, numbers, strict=True) if len(blocks) > 1]
        if across and walk.how.folder is not None:
            raise ValueError(
                "permute: the residual stream reaches over all blocks, which a folder takes one at "
                "a time; use shared: leave or gather, or no folder"
            )
        if across:
            layers = [layer for group in walk.layers.values() for layer in group]
            what = self.method, layers, walk.model, walk.calibration
            self.did.folded.append(permute_layers(*what, across, self.permute))
            self.did.folded[-1].measured = None  # of the dense model

    def _identity(self) -> dict[str, str]:
        """What must be the same for a run to go on from the blocks of another one."""
        total = sum(float(item.stream.double().sum()) for item in self.items)
        layers = [layer.name for group in self.walk.layers.values() for layer in group]
        return {
            "settings": f"{self.method}, {self.target}, {self.permute if self.folds else ''}",
            "layers": f"{self.walk.blocks.name}: {', '.join(layers)}",
            "calibration data": f"{len(self.items)} batches, {total:.6e}",
        }

    def _said(self) -> str:
        if not self.did.rows:
            return ""
        row = self.did.rows[-1]
        error = "" if row.error is None else f", error {row.error:.3g}"
        return f"; {row.name}: sparsity {row.sparsity:.3f}{error}"

    def _block(self, number: int) -> None:
        with self.walk.block(number) as block:
            if self.finished is not None and self.finished.has(number):
                changes = self._take(block, number, self.finished)
            else:
                changes = self._prune(block, number)
            if number + 1 < len(self.walk.blocks):
                advance(block, self.items, number)
        for change in changes:  # the block is back at home
            home = change.layer.local.device
            change.weight, change.mask = change.weight.to(home), change.mask.to(home)

    def _take(self, block: nn.Module, number: int, finished: FinishedBlocks) -> list[Change]:
        """Load the block, which was pruned before."""
        old = {name: t.clone() for name, t in block.state_dict().items()}
        name = self.walk.blocks.name_of(number)
        if self.walk.weights is None:
            self.did.taken.append(lambda: put_back(block, old))
        finished.load(number, name, block, self.walk.model)
        self.did.rows += finished.rows[number]
        if self.walk.weights is not None:
            return []
        layers = {layer.name: layer for layer in self.walk.layers.get(number, [])}
        changes = []
        for row in finished.rows[number]:
            layer = layers[row.name]
            before = old[layer.parameter_name.removeprefix(f"{name}.")]
            # a copy: whoever undoes the change swaps it with what was loaded
            changes.append(Change(layer, before.clone(), layer.local != 0, row))
        self.did.changes += changes
        return changes

    def _prune(self, block: nn.Module, number: int) -> list[Change]:
        layers, name = self.walk.layers.get(number, []), self.walk.blocks.name_of(number)
        changes: list[Change] = []
        if layers:
            data = as_calibration(self.items, number, self.walk.calibration.memory)
            folded = permute_layers(self.method, layers, block, data, self.folds, self.permute)
            self.did.folded.append(folded)
            step = self.method, layers, self.target, block, data
            changes = prune_step(*step, folded.measured)
            folded.measured = None
        rows = [change.row for change in changes]
        self.did.rows += rows
        if self.walk.weights is not None:
            changes = []  # old weights are in the file they were read from
            self.did.folded.clear()
        self.did.changes += changes
        if self.finished is not None:
            self.finished.put(number, name, block, rows)
        return changes
