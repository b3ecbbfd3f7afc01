"""What a model gives its blocks: recorded while the model runs around stand-ins for them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prunus.calibration.calibration import Calibration, random_states_kept, undisturbed
from prunus.calibration.probes import kind_of, padding_masks, probes_of
from prunus.core.blocks import Blocks
from prunus.core.progress import track
from prunus.core.snapshots import Snapshots
from prunus.engine.sequential.calls import (
    Arguments,
    BlockError,
    RepeatedBlockError,
    beside,
    in_form_of,
    returns_more,
    stream_of,
    without_stream,
)
from prunus.engine.sequential.forwards import eager, stand_in, without_cache

log = logging.getLogger("prunus")


class _RecordingComplete(Exception):  # noqa: N818
    """All that the blocks are called with is known."""


@dataclass
class BlockInput:
    """One calibration batch on its way: the stream's state, and what else each block is given."""

    stream: Tensor
    arguments: list[Arguments]
    """arguments of each block; the stream's place is held by None"""
    batch: Any = field(repr=False)
    """for what it says about padding"""
    beside: list[list[Tensor | None]] = field(default_factory=list)
    """what each block returned beside the stream, and the next one's recorded arguments hold"""
    autocast: torch.dtype | None = None
    """in which dtype the model runs by `torch.autocast`, if it does"""
    probes: dict[str, list[BlockInput]] = field(default_factory=dict)
    """the same with another sequence, by mask, for the first batch of its kind"""
    told: set[str] = field(default_factory=set)
    """what was said in the log of any item's padding"""


class _Recorder:
    """Stands in for the blocks while the model runs around them.

    Each block hands its input on as it is, in the form in which the first one of its class returns
    its output, so that all blocks are reached without being computed: but for that first one on the
    first batch, or on all batches where it returns more tensors, which later blocks may be given.
    """

    def __init__(self, blocks: Blocks, forwards: Sequence[Callable[..., Any]]) -> None:
        self.blocks, self.forwards = blocks, forwards
        self.outputs: dict[type, Any] = {}
        self.single = False  # whether a batch of this kind has shown that each is called once
        self.keep = Snapshots()  # the model may write to what it has given its blocks
        self.begin()

    def begin(self) -> None:
        self.stream: Tensor | None = None
        self.passed: list[Tensor] = []
        self.arguments: list[Arguments] = []
        self.beside: list[list[Tensor | None]] = []
        self.computed: set[type] = set()
        self.autocast: torch.dtype | None = None

    @property
    def complete(self) -> bool:
        return len(self.arguments) == len(self.blocks)

    def standin(self, number: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            stream, arguments = without_stream(args, kwargs)
            self._check(number, stream, arguments)
            if number == 0:
                self.stream, kind = self.keep(stream), stream.device.type
                on = torch.is_autocast_enabled(kind)
                self.autocast = torch.get_autocast_dtype(kind) if on else None
            output = self._output(number, args, kwargs)
            self.arguments.append(self.keep(arguments))
            self.beside.append(self.keep(beside(output)))
            if self.complete and self.single:
                raise _RecordingComplete
            self.passed.append(stream.view_as(stream))  # another object for each block
            return in_form_of(output, self.passed[-1])

        return forward

    def _output(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the first block of this class returns."""
        cls = type(self.blocks.modules[number])
        known = cls in self.outputs
        if not known or (returns_more(self.outputs[cls]) and cls not in self.computed):
            self.outputs[cls] = self.forwards[number](*args, **kwargs)
            stream_of(self.outputs[cls])
            self.computed.add(cls)
        return self.outputs[cls]

    def _check(self, number: int, stream: Tensor, arguments: Arguments) -> None:
        name = self.blocks.name_of(number)
        if number < len(self.arguments):
            raise RepeatedBlockError(f"{name} is called more than once in a forward pass")
        if number > len(self.arguments) or (number and stream is not self.passed[-1]):
            before = self.blocks.name_of(number - 1)
            raise BlockError(f"something is computed between {before} and {name}")
        last = type(self.blocks.modules[number - 1]) if number else None
        older = [t for cls, y in self.outputs.items() if cls is not last for t in beside(y)]
        given = [x for x in (*arguments[0], *arguments[1].values()) if x is not None]
        if any(x is y for x in given for y in (*self.passed, *older)):
            raise BlockError(f"{name} is given what an earlier block puts out, too")


def record(
    model: nn.Module,
    blocks: Blocks,
    calibration: Calibration,
    forwards: Sequence[Callable[..., Any]],
) -> list[BlockInput]:
    """What each block is given for each calibration batch, kept where the model is.

    ``forwards`` compute the blocks. Raises ValueError for empty data, and
    for a model that computes something between its blocks.
    """
    items, recorder = list[BlockInput](), _Recorder(blocks, forwards)
    kinds = set()
    with contextlib.ExitStack() as stack:
        stack.enter_context(undisturbed(model, calibration))
        stack.enter_context(without_cache(model))
        stack.enter_context(torch.no_grad())
        for number, module in enumerate(blocks.modules):
            stack.enter_context(stand_in(module, recorder.standin(number)))
        stack.enter_context(eager(model))
        for batch in track(calibration, "inputs of the first block"):
            kind = kind_of(batch)
            recorder.single = kind in kinds
            items.append(_item(model, calibration, batch, recorder))
            items[-1].told = calibration.told
            if kind not in kinds and padding_masks(batch):
                items[-1].probes = _probes(model, calibration, batch, recorder)
            kinds.add(kind)
    if not items:
        raise ValueError("the calibration data is empty; nothing was pruned")
    return items


def _item(
    model: nn.Module, calibration: Calibration, batch: Any, recorder: _Recorder
) -> BlockInput:
    recorder.begin()
    _run_around(model, calibration, batch, recorder)
    assert recorder.stream is not None
    given = recorder.stream, recorder.arguments, batch, recorder.beside
    return BlockInput(*given, recorder.autocast)


def _probes(
    model: nn.Module, calibration: Calibration, batch: Any, recorder: _Recorder
) -> dict[str, list[BlockInput]]:
    """What the blocks are given for batches in which one sequence is another."""
    found: dict[str, list[BlockInput]] = {}
    recorder.single = True
    for key, probes in probes_of(batch, model).items():
        found[key] = []
        for probe in probes:
            with random_states_kept():
                try:
                    found[key].append(_item(model, calibration, probe, recorder))
                except Exception as error:  # without one, layers keep their padding, and say so
                    log.debug("a batch with other tokens did not reach the blocks: %s", error)
    return found


def _run_around(
    model: nn.Module, calibration: Calibration, batch: Any, recorder: _Recorder
) -> None:
    try:
        calibration.run(model, batch)
    except BlockError:
        raise
    except _RecordingComplete:
        return
    except Exception as error:  # the model may not like what no block has computed
        if not recorder.passed:
            raise
        if not recorder.complete:
            name = recorder.blocks.name
            raise BlockError(f"the model fails around '{name}' ({error})") from error
    if not recorder.complete:
        raise BlockError(f"the model does not call all of '{recorder.blocks.name}'")
