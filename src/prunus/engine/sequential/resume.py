"""The folder of a sequential run: blocks that are finished, for a killed run to go on from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunus.core.blocks import BlockLists
from prunus.core.files import atomic_write, check_writable
from prunus.core.layers import Layer
from prunus.core.ranks import all_ranks
from prunus.core.wrappers import clean_name
from prunus.engine.method import LayerResult
from prunus.engine.permute.step import FoldRow, PermutationResult
from prunus.engine.sequential.lazy_weights import (
    INDEX,
    Weights,
    materialize,
    write_atomically,
    write_index,
)

PROGRESS = "progress.json"
REST = "rest.safetensors"
Sums = dict[str, list[float]]


def _file(number: int) -> str:
    return f"block-{number:05d}.safetensors"


def tensors_of(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Parameters and saved buffers by clean name, tied ones by their first."""
    state = module.state_dict(keep_vars=True)
    once = {id(t): name for name, t in reversed(state.items())}
    return {f"{prefix}{clean_name(name)}": state[name] for name in reversed(once.values())}


@torch.no_grad()
def copy_into(block: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy tensors, named as by `tensors_of`, into the block."""
    for name, t in tensors_of(block).items():
        t.copy_(state[name])


def sums_of(layers: Sequence[Layer]) -> Sums:
    """For each layer the sums of its weights and of their magnitudes, to know them again by."""
    weights = {layer.name: layer.local for layer in layers}
    return {
        name: [float(x.sum(dtype=torch.float64)) for x in (w, w.abs())]
        for name, w in weights.items()
    }


def _alike(a: Sums, b: Sums) -> bool:
    """Up to the order of summation, which devices differ in."""
    return a.keys() == b.keys() and all(
        abs(x - y) <= 1e-9 * a[name][1] for name in a for x, y in zip(a[name], b[name], strict=True)
    )


def check_folder(folder: str, weights: str | None) -> None:
    """Raises ValueError if the folder cannot take the blocks of a run, or holds something else.

    And OSError if it cannot be written to.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise ValueError(f"folder='{folder}' is a file; name a folder")
    if weights is not None and path.resolve() in (p := Path(weights).resolve(), *p.parents):
        raise ValueError(
            f"weights='{weights}' lies in folder='{folder}', where the pruned blocks are to be "
            "written; use another folder"
        )
    found = [*path.glob("*.safetensors"), *path.glob(INDEX)]
    if found and not (path / PROGRESS).exists():
        raise ValueError(
            f"folder='{folder}' holds {found[0].name} of something else, which loaders would take "
            "for the pruned model; use an empty folder"
        )
    check_writable(path / PROGRESS)


def _message_of_first(text: str) -> str:
    """The text of rank 0, on all ranks."""
    ranks = all_ranks()
    message = torch.tensor(list(text.encode()) if ranks.rank == 0 else [], dtype=torch.uint8)
    length = int(ranks.all_reduce(torch.tensor([len(message)])))
    whole = torch.zeros(length, dtype=torch.uint8)
    whole[: len(message)] = message
    return bytes(ranks.all_reduce(whole).tolist()).decode()


@dataclass
class Record:
    """What became of one block."""

    dense: Sums
    """of its layers, before"""
    rows: list[LayerResult] = field(default_factory=list)
    permuted: list[FoldRow] = field(default_factory=list)
    not_permuted: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, dense: Sums, rows: list[LayerResult], folded: PermutationResult) -> Record:
        return cls(dense, rows, list(folded.rows), dict(folded.refused))

    @classmethod
    def read(cls, state: dict[str, Any]) -> Record:
        rows = [LayerResult(**{**row, "shape": tuple(row["shape"])}) for row in state["rows"]]
        permuted = [FoldRow(**row) for row in state["permuted"]]
        return cls(state["dense"], rows, permuted, state["not_permuted"])

    @property
    def folded(self) -> PermutationResult:
        """What has been permuted, with nothing left to undo: it came with the weights."""
        return PermutationResult(list(self.permuted), dict(self.not_permuted))


class FinishedBlocks:
    """One safetensors file for each block, and what became of its layers.

    The file of a block is complete before `progress.json` names it, so a kill loses one block at
    most. Rank 0 alone reads and writes `progress.json`; every rank must make every call, and what
    fails on one fails on all. Raises ValueError if the folder holds the blocks of another run.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: dict[str, str]) -> None:
        self.folder, self.identity = Path(folder), identity
        self.first = all_ranks().rank == 0
        self.records: list[Record] = []
        message = "{}"
        with all_ranks().raise_on_all_ranks():
            if self.first:
                message = self._open()
        message = json.loads(_message_of_first(message))
        if message["refused"]:
            raise ValueError(message["refused"])
        self.records = [Record.read(state) for state in message["blocks"]]

    def _open(self) -> str:
        """The finished blocks, or why there are none to go on from."""
        path = self.folder / PROGRESS
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write_progress()  # first of all, so that the folder is known for ours
        state = json.loads(path.read_text())
        other = [key for key, value in self.identity.items() if state["identity"].get(key) != value]
        refused = self._other(other[0], state["identity"].get(other[0])) if other else ""
        return json.dumps({"refused": refused, "blocks": state["blocks"]})

    def _other(self, key: str, value: str) -> str:
        return (
            f"'{self.folder}' holds the blocks of a run with other {key} ({value}); use another "
            "folder, or delete it"
        )

    def has(self, number: int) -> bool:
        return number < len(self.records)

    def put(self, number: int, name: str, block: nn.Module, record: Record) -> None:
        """Write the block of this number; the ones before it must be there."""
        assert number == len(self.records)
        self.records.append(record)
        with all_ranks().raise_on_all_ranks():
            if self.first:
                write_atomically(self.folder / _file(number), tensors_of(block, f"{name}."))
                self._write_progress()

    def _write_progress(self) -> None:
        blocks = [asdict(record) for record in self.records]
        with atomic_write(self.folder / PROGRESS) as draft:
            draft.write_text(json.dumps({"identity": self.identity, "blocks": blocks}, indent=1))

    def load(self, number: int, name: str, block: nn.Module, dense: Sums) -> Record:
        """Load the finished block of this number and name, whose dense layers have these sums.

        Raises ValueError if it was another model's.
        """
        record = self.records[number]
        with all_ranks().raise_on_all_ranks():
            weights = Weights(self.folder / _file(number))
            wanted = tensors_of(block, f"{name}.").keys()
            if not _alike(record.dense, dense) or wanted != weights.files.keys():
                raise ValueError(self._other("weights", f"of {name}"))
            state = {key.removeprefix(f"{name}."): weights.read(key) for key in wanted}
            copy_into(block, state)
        return record

    @torch.no_grad()
    def fill(self, number: int, name: str, block: nn.Module) -> list[Tensor] | None:
        """Give a block on the meta device what it has in its file; None if there is none yet.

        What is not on the meta device is overwritten; what was is returned.
        """
        if not self.has(number):
            return None
        weights = Weights(self.folder / _file(number))
        filled = materialize(block, name, weights)
        made = {id(t) for t in filled}
        for key, t in tensors_of(block, f"{name}.").items():
            if id(t) not in made:
                t.copy_(weights.read(key))
        return filled

    def close(self, model: nn.Module, blocks: BlockLists) -> None:
        """Write all that is in no block, and the index by which loaders find each tensor."""
        with all_ranks().raise_on_all_ranks():
            if not self.first:
                return
            state = tensors_of(model)
            rest = {name: t for name, t in state.items() if blocks.number_of(name) is None}
            write_atomically(self.folder / REST, rest)
            write_index(self.folder, [*map(_file, range(len(blocks))), REST])
