"""One walk through the blocks of a model: read, permute, prune, write, carry on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from prunus.calibration.calibration import Calibration
from prunus.core.blocks import Blocks
from prunus.core.layers import Layer, unwrap
from prunus.core.progress import Bar
from prunus.core.ranks import all_ranks
from prunus.engine.method import LayerResult, LayerUpdate, Method
from prunus.engine.permute.folds import Fold
from prunus.engine.permute.step import PermutationResult, Permute, permute_layers
from prunus.engine.sequential.lazy_weights import Weights, materialize, move, release
from prunus.engine.sequential.record import BlockInput, record
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


@dataclass(frozen=True)
class Sequential:
    """How to prune block by block, and where the blocks are meanwhile.

    >>> blocks = [nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2)]
    >>> model = nn.Sequential(*blocks)
    >>> data = prunus.Calibration([torch.randn(8, 4)])
    >>> how = prunus.Sequential(device="cpu")
    >>> prunus.prune(
    ...     model, "wanda", sparsity=0.5, layers="*", sequential=how, calibration=data
    ... ).sparsity
    0.5
    """

    blocks: str | None = None
    """name of the list of blocks, as `model.layers`; default: the one with the most weights"""
    device: str | None = None
    """where the block is that is worked on; default: where the model is"""
    weights: str | None = None
    """a safetensors file, or a folder of them: for a model on the meta device, of which one block
    at a time is read; needs `folder`"""
    folder: str | None = None
    """where each finished block is written; a run that was killed goes on from there"""

    @classmethod
    def of(cls, value: bool | str | Sequential) -> Sequential | None:
        """What recipes and calls may write: the list's name, or true to find it."""
        if isinstance(value, Sequential) or not value:
            return value or None
        return cls(None if value is True else value)

    def __post_init__(self) -> None:
        if self.weights is not None and self.folder is None:
            raise ValueError(
                "sequential: weights are read block by block; say in which folder to "
                "write the pruned ones, as folder='pruned'"
            )
        try:
            torch.device(self.device or "cpu")
        except RuntimeError:
            raise ValueError(
                f"sequential: device={self.device!r} is none; use 'cuda', 'cuda:1' or 'cpu'"
            ) from None


@dataclass
class SequentialResult:
    """What became of the blocks."""

    changes: list[LayerUpdate] = field(default_factory=list)
    rows: list[LayerResult] = field(default_factory=list)
    folded: list[PermutationResult] = field(default_factory=list)
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

    def items(self) -> list[BlockInput]:
        with all_ranks().raise_on_all_ranks(), self.block(0, at_home=True):
            return record(self.model, self.blocks, self.calibration)

    @contextlib.contextmanager
    def block(self, number: int, at_home: bool = False) -> Iterator[nn.Module]:
        """The block, read from disk and moved to where it is worked on, and back again."""
        block = self.blocks.modules[number]
        with self._read(block, number):
            held = [*block.parameters(), *block.buffers()]
            home = held[0].device if held else torch.device("cpu")
            try:
                if not at_home and self.how.device is not None:
                    move(block, self.how.device)
                yield block
            finally:
                move(block, home)

    @contextlib.contextmanager
    def _read(self, block: nn.Module, number: int) -> Iterator[None]:
        """With its weights from disk, where there are any; afterwards it is as it was."""
        if self.weights is None:
            yield
            return
        there = [t for t in [*block.parameters(), *block.buffers()] if not t.is_meta]
        old = [t.detach().clone() for t in there]
        filled = materialize(block, self.blocks.name_of(number), self.weights)
        try:
            yield
        finally:
            release(filled)
            with torch.no_grad():
                for t, was in zip(there, old, strict=True):
                    t.copy_(was)


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

    def run(self) -> SequentialResult:
        walk, count = self.walk, len(self.walk.blocks)
        bar = Bar(f"block 1 of {count}", count)
        try:
            self._permute_across()
            self.items = walk.items()
            folder = walk.how.folder
            self.finished = (
                None if folder is None else FinishedBlocks(folder, self._identity(self.items))
            )
            for number in range(count):
                bar.step(number, f"block {number + 1} of {count}{self._said()}")
                self._block(number)
            if self.finished is not None:
                self.finished.close(unwrap(walk.model), walk.blocks)
        except BaseException:
            self.result.undo()
            raise
        finally:
            bar.close()
        return self.result

    def _permute_across(self) -> None:
        """Folds that reach over several blocks come first, on the model as it is."""
        walk = self.walk
        across: list[Fold] = []
        within: list[Fold] = []
        for fold in self.folds:
            numbers = {walk.blocks.number_of(name) for name in fold.names}
            (within if len(numbers) == 1 and None not in numbers else across).append(fold)
        self.folds = within
        if across and walk.how.folder is not None:
            raise ValueError(
                f"permute: {across[0].name} reaches over several blocks, which a folder takes one "
                "at a time; use shared: leave, exclude its layers, or use no folder"
            )
        if across:
            layers = [layer for group in walk.layers.values() for layer in group]
            what = self.method, layers, walk.model, walk.calibration
            self.result.folded.append(permute_layers(*what, across, self.permute))
            self.result.folded[-1].measured = None  # of the dense model

    def _identity(self, items: Sequence[BlockInput]) -> dict[str, str]:
        """What must be the same for a run to go on from the blocks of another one."""
        total = sum(float(item.stream.double().sum()) for item in items)
        counted = torch.tensor([len(items), total], dtype=torch.float64)
        count, total = all_ranks().all_reduce(counted).tolist()
        layers = [layer.name for group in self.walk.layers.values() for layer in group]
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

    def _block(self, number: int) -> None:
        walk = self.walk
        with walk.block(number) as block:
            layers = walk.layers.get(number, [])
            dense = {} if self.finished is None else sums_of(layers)
            if self.finished is not None and self.finished.has(number):
                changes = self._take(block, number, self.finished, dense)
            else:
                changes = self._prune(block, number, dense)
            if number + 1 < len(walk.blocks):
                advance(block, self.items, number)
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

    def _prune(self, block: nn.Module, number: int, dense: Sums) -> list[LayerUpdate]:
        layers, name = self.walk.layers.get(number, []), self.walk.blocks.name_of(number)
        changes, folded = list[LayerUpdate](), PermutationResult()
        if layers:
            data = as_calibration(self.items, number, self.walk.calibration.memory)
            folded = permute_layers(self.method, layers, block, data, self.folds, self.permute)
            if self.walk.weights is None:
                self.result.folded.append(folded)
            step = self.method, layers, self.target, block, data
            changes = prune_step(*step, folded.measured)
            folded.measured = None
        rows = [change.row for change in changes]
        self.result.rows += rows
        if self.walk.weights is not None:
            changes = []  # the block goes back to what it was read from
            self.result.folded.append(PermutationResult(folded.rows, folded.refused))
        self.result.changes += changes
        if self.finished is not None:
            self.finished.put(number, name, block, Record.of(dense, rows, folded))
        return changes
