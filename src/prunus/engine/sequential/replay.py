"""What blocks are given, as calibration data of one block at a time, carried on to the next."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from prunus.calibration.batches import tensors_in, to_device
from prunus.calibration.calibration import Calibration, undisturbed
from prunus.calibration.probes import RecordedBatch
from prunus.core.progress import track
from prunus.engine.sequential.calls import BlockError, beside, stream_of, with_stream
from prunus.engine.sequential.forwards import eager
from prunus.engine.sequential.record import BlockInput

log = logging.getLogger("prunus")


def as_calibration(
    items: list[BlockInput],
    number: int,
    memory: str | int | None,
    outputs: dict[int, Any] | None = None,
) -> Calibration:
    """The items as calibration batches of the block of this number.

    What the block makes of them is put into `outputs`, where that is given, by the items' `id`: a
    batch may be run more than once.
    """

    def forward(block: nn.Module, batch: _Batch) -> None:
        output = _run(block, batch)
        if outputs is not None:
            outputs[id(batch.item)] = to_device(output, batch.item.stream.device)

    return Calibration([_Batch(item, number) for item in items], forward=forward, memory=memory)


@torch.no_grad()
def carry_on(
    block: nn.Module, items: list[BlockInput], number: int, outputs: dict[int, Any]
) -> None:
    """The outputs of a block become what the next one is given."""
    with undisturbed(block, as_calibration(items, number, None)):
        for item in items:
            _carry(item, number, outputs[id(item)])
            _carry_probes(block, item, number)


def _carry(item: BlockInput, number: int, output: Any) -> None:
    """The stream, and what the next block is given of the tensors returned beside it."""
    place = item.stream.device
    item.stream, item.arguments[number] = stream_of(output).to(place), ((), {})
    pairs = zip(item.beside[number], beside(output), strict=False)
    fresh = {id(a): b.to(place) for a, b in pairs if a is not None and b is not None}
    if fresh and number + 1 < len(item.arguments):
        args, kwargs = item.arguments[number + 1]
        kwargs = {key: fresh.get(id(x), x) for key, x in kwargs.items()}
        item.arguments[number + 1] = tuple(fresh.get(id(x), x) for x in args), kwargs


class _Batch(RecordedBatch):
    """A batch as the block sees it: says what the user's batch says about padding."""

    def __init__(self, item: BlockInput, number: int) -> None:
        self.item, self.number, self.told = item, number, item.told

    def probes(self) -> dict[str, list[_Batch]]:
        return {key: [_Batch(x, self.number) for x in xs] for key, xs in self.item.probes.items()}

    def __getitem__(self, key: str) -> Any:
        if isinstance(self.item.batch, Mapping):
            return self.item.batch[key]
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.item.batch if isinstance(self.item.batch, Mapping) else ())

    def __len__(self) -> int:
        return len(self.item.batch) if isinstance(self.item.batch, Mapping) else 0


def _run(block: nn.Module, batch: _Batch) -> Any:
    item, first = batch.item, next(block.parameters(), None)
    device = item.stream.device if first is None else first.device
    # copies, because the block may write to them and runs more than once
    given = with_stream(item.stream, item.arguments[batch.number])
    args, kwargs = to_device(given, device, True)
    copies = [*tensors_in((args, kwargs))]
    on = item.autocast is not None
    with eager(block), torch.autocast(device.type, item.autocast, enabled=on):
        output = block(*args, **kwargs)
    later = {id(t) for t in tensors_in(item.arguments[batch.number + 1 :])}
    for t, copy in zip(tensors_in(given), copies, strict=True):
        if id(t) in later and not copy.is_inference() and copy._version:
            raise BlockError(
                f"block {batch.number} writes to a tensor that later blocks are given, too"
            )
    return output


@torch.no_grad()
def advance(block: nn.Module, items: list[BlockInput], number: int) -> None:
    """Carry the items on to the next block, one after the other."""
    calibration = as_calibration(items, number, None)
    with undisturbed(block, calibration):
        for item in track(items, "outputs"):
            _carry(item, number, _run(block, _Batch(item, number)))
            _carry_probes(block, item, number)


def _carry_probes(block: nn.Module, item: BlockInput, number: int) -> None:
    """Carry on the first shorter one that the block takes, and the one of the same length."""
    for key, probes in item.probes.items():
        kept: dict[bool, BlockInput] = {}
        for probe in probes:
            whole = probe.batch[key].shape == item.batch[key].shape
            if whole in kept:
                continue
            try:
                output = _run(block, _Batch(probe, number))
            except Exception as error:  # without one, later layers keep their padding, and say so
                log.debug("a batch with other tokens was not run to its end: %s", error)
            else:
                _carry(probe, number, output)
                kept[whole] = probe
        item.probes[key] = [*kept.values()]
