"""How to get at a model's blocks one at a time: in order, read, moved, and with their inputs."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from prunus.calibration.batches import to_device
from prunus.calibration.calibration import Calibration, undisturbed
from prunus.core.blocks import BlockLists, Blocks
from prunus.core.layers import Layer
from prunus.core.names import few
from prunus.core.ranks import all_ranks
from prunus.engine.sequential.calls import BlockError, RepeatedBlockError
from prunus.engine.sequential.forwards import eager, stand_in, without_cache
from prunus.engine.sequential.lazy_weights import Weights, materialize, move, release
from prunus.engine.sequential.options import Sequential
from prunus.engine.sequential.record import BlockInput, record

log = logging.getLogger("prunus")


class Finished(Protocol):
    """Blocks that have been pruned and written."""

    def fill(self, number: int, name: str, block: nn.Module) -> list[Tensor] | None: ...


@dataclass
class Walk:
    """The blocks of a model, and how to get at one of them at a time."""

    model: nn.Module
    calibration: Calibration
    blocks: BlockLists
    everything: Sequence[Layer]
    how: Sequential
    weights: Weights | None
    finished: Finished | None = None
    """where the pruned blocks are, of a model whose weights are on disk"""
    layers: dict[int, list[Layer]] = field(init=False)
    """of each block"""
    outside: list[Layer] = field(init=False)
    """layers in no block, or in several, which are pruned when all blocks are"""

    def __post_init__(self) -> None:
        self._use(self.blocks.lists)
        self._use([b for b in self.blocks.lists if any(map(self.layers.get, self._numbers(b)))])

    def _use(self, lists: Sequence[Blocks]) -> None:
        self.blocks, self.layers, self.outside = BlockLists(tuple(lists)), {}, []
        for layer in self.everything:
            number = self.blocks.owner(layer)
            if number is None:
                self.outside.append(layer)
            else:
                self.layers.setdefault(number, []).append(layer)

    def lists(self) -> Iterator[tuple[range, list[BlockInput]]]:
        """The numbers of each list's blocks and what the model gives them by then.

        In the order in which the model calls them. Layers of lists whose blocks cannot be run one
        by one come to those outside. Raises BlockError if that is the only list.
        """
        self._sort()
        alone = len(self.blocks.lists) == 1
        for blocks in self.blocks.lists:
            items, error = self._items(blocks)
            if error is None:
                yield self._numbers(blocks), items
                continue
            again = isinstance(error, RepeatedBlockError)
            if self.how.weights is not None or (alone and not again):
                raise error
            log.warning("%s: the layers of '%s' come last, together", error.why, blocks.name)
            self._use([other for other in self.blocks.lists if other is not blocks])

    def _numbers(self, blocks: Blocks) -> range:
        return self.blocks.numbers(blocks)

    @torch.no_grad()
    def _sort(self) -> None:
        """Lists that the model calls first come first; seen on the first batch."""
        lists, seen = self.blocks.lists, list[Blocks]()
        if len(lists) < 2:
            return

        def note(blocks: Blocks) -> Callable[..., None]:
            return lambda *_: None if blocks in seen else seen.append(blocks)

        with contextlib.ExitStack() as stack:
            stack.enter_context(all_ranks().raise_on_all_ranks())
            stack.enter_context(undisturbed(self.model, self.calibration))
            stack.enter_context(without_cache(self.model))
            stack.enter_context(self.within_reach())
            stack.enter_context(eager(self.model))
            for blocks in lists:
                for module in blocks.modules:
                    handle = module.register_forward_pre_hook(note(blocks))
                    stack.callback(handle.remove)
            for batch in self.calibration:
                self.calibration.run(self.model, batch)
                break
        places = [seen.index(b) if b in seen else len(seen) for b in lists]
        ranks = all_ranks()  # which must go the same way, whatever their first batches are
        places = ranks.all_reduce(torch.tensor(places) * (ranks.rank == 0)).tolist()
        self._use([b for _, b in sorted(zip(places, lists, strict=True), key=lambda pair: pair[0])])

    def _items(self, blocks: Blocks) -> tuple[list[BlockInput], BlockError | None]:
        """What the blocks are given, or why they cannot be run one by one on some rank."""
        items, error = list[BlockInput](), None
        forwards = [self._forward(number) for number in self._numbers(blocks)]
        with all_ranks().raise_on_all_ranks(), self.within_reach(besides=blocks):
            try:
                items = record(self.model, blocks, self.calibration, forwards)
            except BlockError as caught:
                error = caught
        found = torch.tensor([error is not None, isinstance(error, RepeatedBlockError)]).int()
        failed, again = all_ranks().all_reduce(found).tolist()
        if again and not isinstance(error, RepeatedBlockError):
            error = RepeatedBlockError(f"another rank calls '{blocks.name}' more than once")
        elif failed and error is None:
            error = BlockError(f"another rank cannot run the blocks of '{blocks.name}' one by one")
        return items, error

    @contextlib.contextmanager
    def within_reach(self, besides: Blocks | None = None) -> Iterator[None]:
        """While the whole model runs, blocks are read and moved when they are called."""
        with contextlib.ExitStack() as stack:
            if self._elsewhere:
                for number, module in enumerate(self.blocks.modules):
                    if besides is None or module not in besides.modules:
                        stack.enter_context(stand_in(module, self._forward(number)))
            yield

    @property
    def _elsewhere(self) -> bool:
        """Whether blocks are not at hand where the model is."""
        return self.weights is not None or self.how.device is not None

    def _forward(self, number: int) -> Callable[..., Any]:
        """The block's own, which brings it first, where it is not at hand."""
        real: Callable[..., Any] = self.blocks.modules[number].forward
        if not self._elsewhere:
            return real

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
            with self.block(number, pruned=True) as block:
                at_work = next((p.device for p in block.parameters()), None)
                if given is None or at_work is None or given.device == at_work:
                    return real(*args, **kwargs)
                there: Mapping[str, Any] = to_device(kwargs, at_work)
                return to_device(real(*to_device(args, at_work), **there), given.device)

        return forward

    @contextlib.contextmanager
    def block(self, number: int, pruned: bool = False) -> Iterator[nn.Module]:
        """The block, read from disk and moved to where it is worked on, and back again.

        With `pruned` it is read from where it was written, if it was.
        """
        block = self.blocks.modules[number]
        with self._read(block, number, pruned):
            held = [*block.parameters(), *block.buffers()]
            home = held[0].device if held else torch.device("cpu")
            try:
                if self.how.device is not None:
                    move(block, self.how.device)
                yield block
            finally:
                move(block, home)

    @contextlib.contextmanager
    def _read(self, block: nn.Module, number: int, pruned: bool) -> Iterator[None]:
        """With its weights from disk, where there are any; afterwards it is as it was."""
        if self.weights is None:
            yield
            return
        there = [t for t in [*block.parameters(), *block.buffers()] if not t.is_meta]
        old = [t.detach().clone() for t in there]
        name, filled = self.blocks.name_of(number), None
        if pruned and self.finished is not None:
            filled = self.finished.fill(number, name, block)
        if filled is None:
            filled = materialize(block, name, self.weights)
        try:
            yield
        finally:
            release(filled)
            with torch.no_grad():
                for t, was in zip(there, old, strict=True):
                    t.copy_(was)

    def check_folder(self) -> None:
        """Raises ValueError for what a folder of finished blocks cannot hold."""
        inside = [x.name for x in self.outside if self.blocks.number_of(x.name) is not None]
        if inside and self.how.folder is not None:
            raise ValueError(
                f"sequential: {few(inside)} is in several blocks, which a folder takes one at a "
                "time; use no folder, or exclude it"
            )
