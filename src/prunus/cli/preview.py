"""What `prunus check` shows of a pruning entry: its layers, permutations and memory."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich import box
from rich.console import RenderableType
from rich.table import Table

from prunus.modifiers import PruningRun, TrainingRun


def table_of(*columns: str, title: str = "") -> Table:
    return Table(*columns, title=title or None, title_justify="left", box=box.SIMPLE_HEAD)


def preview(run: PruningRun | TrainingRun, where: str) -> Iterator[RenderableType]:
    """Tables and lines for the entry at this place of the recipe."""
    yield _layers(run, where)
    if run.left_dense:
        yield f"left dense: {', '.join(run.left_dense)}"
    if isinstance(run, TrainingRun):
        yield _bytes(run)
        return
    if run.modifier.permute is not None:
        yield _folds(run)
    yield from _memory(run)


def _folds(run: PruningRun) -> Table:
    table = table_of("input channels of", "permutation", title="permutations to be folded in")
    for fold in run.folds.folds:
        groups, copies, width = fold.positions.shape
        parts = f"{groups} x {width} channels" if groups > 1 else f"{width} channels"
        also = f", {copies} copies" if copies > 1 else ""
        table.add_row(fold.name, f"{fold.kind}: {parts}{also}, {len(fold.slots)} tensors move")
    for name, reason in run.folds.refused.items():
        table.add_row(name, f"none: {reason}")
    return table


def _layers(run: PruningRun | TrainingRun, where: str) -> Table:
    stats = run.measurements().stats if isinstance(run, PruningRun) else {}
    columns = ["layer", "kind", "shape", "weights", *(["statistics"] if stats else [])]
    table = table_of(*columns, title=f"{where} prune: {len(run.layers)} layers")
    for layer in run.layers:
        shape = "x".join(map(str, layer.shape))
        size = [_size(stats[layer].nbytes)] if layer in stats else []
        table.add_row(layer.name, layer.kind, shape, f"{math.prod(layer.shape):,}", *size)
    return table


def _size(nbytes: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:,.0f} {unit}" if unit == "B" else f"{nbytes:,.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:,.1f} TiB"


def _memory(run: PruningRun) -> list[str]:
    measured = run.measurements()
    plan = []
    if len(measured.groups) > 1 and run.modifier.walk(run.context) is None:
        whole = sum(stat.nbytes for stat in measured.stats.values())
        plan = [
            f"statistics of {_size(whole)} in {len(measured.groups)} groups, one at a time: "
            f"{run.passes()} passes over the calibration data in each pruning step"
        ]
    return [_bytes(run), *plan]


def _bytes(run: PruningRun | TrainingRun) -> str:
    lines = [f"{what}: {_size(nbytes)}" for what, nbytes in run.memory().items()]
    return "memory: " + "; ".join(lines)
