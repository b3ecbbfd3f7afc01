"""What the research programs share at their edges: options, processes, and files."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from prunus.core.files import atomic_write
from prunus.core.ranks import Ranks, all_ranks


def dashed(argument: str) -> str:
    """An option with dashes for underscores, its value as it is."""
    option, equals, value = argument.partition("=")
    return option.replace("_", "-") + equals + value if option.startswith("--") else argument


@contextmanager
def processes(device: str, timeout: float) -> Iterator[tuple[Ranks, torch.device]]:
    """All processes that torchrun has started, or the one there is, and this one's device.

    ``timeout`` is how many seconds the others wait for one that is still at work.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks(), torch.device(device)
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        yield all_ranks(), torch.device(device)
    finally:
        dist.destroy_process_group()


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """The whole table, whole or not at all; columns in the order in which they first appear."""
    rows = list(rows)
    columns = dict.fromkeys(name for row in rows for name in row)
    with atomic_write(path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns), restval="")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, Any]]:
    """The rows of a table of numbers by `write_csv`; none if there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {name: float(value) if value else "" for name, value in row.items()}
            for row in csv.DictReader(file)
        ]
