"""How much memory there is, and which rows of which layers fit into it together."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from prunus.core.layers import Layer

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(text: str | int) -> int:
    """``"8GiB"``, ``"500MB"`` or a number of bytes. Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(text).lower())
    if not match or match[2].upper() not in UNITS or float(match[1]) == 0:
        raise ValueError(f"memory={text!r} is no size; write '8GiB', '500MB' or a number of bytes")
    return int(float(match[1]) * UNITS[match[2].upper()])


def free_bytes(device: torch.device) -> int | None:
    """Bytes that this process may still take on the device; None if nobody says."""
    sharing = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    info = Path("/proc/meminfo")
    if device.type != "cpu" or not info.exists():
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", info.read_text())
    return int(found[1]) * 1024 // sharing if found else None


@dataclass(frozen=True)
class Rows:
    """Some rows of the (local) matrix of a layer."""

    layer: Layer
    begin: int
    end: int

    def __len__(self) -> int:
        return self.end - self.begin

    def matrix(self) -> Tensor:
        """The weights in them, (rows, columns); a view where it can be."""
        return self.layer.matrix(self.layer.local)[self.begin : self.end]


@dataclass(frozen=True)
class Need:
    """A layer of so many rows, each of so many bytes; with none, it cannot be split."""

    layer: Layer
    rows: int
    row_bytes: int
    whole_bytes: int = 0

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes + self.whole_bytes


def plan(needs: Sequence[Need], budget: int | None) -> list[list[Rows]]:
    """Groups of rows, in order, none of which takes more than `budget` bytes.

    Raises ValueError if a single row of a layer does.
    """
    groups: list[list[Rows]] = [[]]
    left = math.inf if budget is None else budget
    for need in needs:
        begin = 0
        while begin < need.rows:
            rows = _fitting(need, need.rows - begin, left)
            if rows == 0 and not groups[-1]:
                raise ValueError(
                    f"{need.layer.name}: memory for statistics is {budget:,} bytes, and "
                    f"{'a single row' if need.row_bytes else 'this layer'} takes "
                    f"{need.row_bytes or need.whole_bytes:,}; raise 'memory', or lower "
                    "'block_size' or 'num_grads'"
                )
            if rows == 0:
                groups.append([])
                left = budget or math.inf
                continue
            groups[-1].append(Rows(need.layer, begin, begin + rows))
            left -= rows * need.row_bytes + need.whole_bytes
            begin += rows
    return groups


def _fitting(need: Need, rows: int, left: float) -> int:
    """How many of the next `rows` rows fit into what is left."""
    if left == math.inf:
        return rows
    if need.row_bytes:
        return min(rows, int(left) // need.row_bytes)
    return rows if need.whole_bytes <= left else 0
