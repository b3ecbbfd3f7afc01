"""The folder of a sequential run: blocks that are finished, for a killed run to go on from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from prunus.blocks import Blocks
from prunus.distributed import all_ranks
from prunus.layers import clean_name
from prunus.lazy_weights import Weights, write_atomically, write_index
from prunus.method import LayerRow
from prunus.permute.gather import restore_gathers

PROGRESS = "progress.json"
REST = "rest.safetensors"


def _file(number: int) -> str:
    return f"block-{number:05d}.safetensors"


def _tensors(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    state = module.state_dict(keep_vars=True)
    once = {id(t): name for name, t in reversed(state.items())}  # tied weights by their first name
    return {f"{prefix}{clean_name(name)}": state[name] for name in reversed(once.values())}


@torch.no_grad()
def put_back(block: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy the tensors of a state dict into the block, whatever wrappers are in its names."""
    for name, t in block.state_dict(keep_vars=True).items():
        t.copy_(state[name] if name in state else state[clean_name(name)])


class FinishedBlocks:
    """One safetensors file for each block, and what became of its layers.

    The file of a block is complete before `progress.json` names it, so a kill loses one block at
    most. Raises ValueError if the folder holds the blocks of another run.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: dict[str, str]) -> None:
        self.folder, self.identity = Path(folder), identity
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows: list[list[LayerRow]] = []
        path = self.folder / PROGRESS
        if not path.exists():
            return
        state = json.loads(path.read_text())
        for key, value in identity.items():
            if state["identity"].get(key) != value:
                raise ValueError(
                    f"'{folder}' holds the blocks of a run with other {key} "
                    f"({state['identity'].get(key)}); use another folder, or delete it"
                )
        for rows in state["rows"]:
            self.rows.append([LayerRow(**{**row, "shape": tuple(row["shape"])}) for row in rows])

    def has(self, number: int) -> bool:
        return number < len(self.rows)

    def put(self, number: int, name: str, block: nn.Module, rows: Sequence[LayerRow]) -> None:
        """Write the block of this number; the ones before it must be there."""
        assert number == len(self.rows)
        self.rows.append(list(rows))
        if all_ranks().rank == 0:
            write_atomically(self.folder / _file(number), _tensors(block, f"{name}."))
            self._write_progress()

    def _write_progress(self) -> None:
        rows = [[asdict(row) for row in each] for each in self.rows]
        part = self.folder / f".{PROGRESS}"
        part.write_text(json.dumps({"identity": self.identity, "rows": rows}, indent=1))
        os.replace(part, self.folder / PROGRESS)

    def load(self, number: int, name: str, block: nn.Module, model: nn.Module) -> None:
        """Load the finished block of this number and name."""
        weights = Weights(self.folder / _file(number))
        state = {key: weights.read(key) for key in weights.files}
        restore_gathers(model, state)
        put_back(block, {key.removeprefix(f"{name}."): t for key, t in state.items()})

    def close(self, model: nn.Module, blocks: Blocks) -> None:
        """Write all that is in no block, and the index by which loaders find each tensor."""
        if all_ranks().rank != 0:
            return
        state = _tensors(model, "")
        rest = {name: t for name, t in state.items() if blocks.number_of(name) is None}
        write_atomically(self.folder / REST, rest)
        write_index(self.folder)
