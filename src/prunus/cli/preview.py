"""What `prunus check` shows of an entry that masks: its layers, permutations, memory and times."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import RenderableType
from rich.table import Table

from prunus.core.default_dense_layers import dense_line
from prunus.core.layers import Layer
from prunus.engine.method import misfits_message
from prunus.engine.plan import PruningPlan
from prunus.modifiers import Run


def table_of(*columns: str, title: str = "") -> Table:
    return Table(*columns, title=title or None, title_justify="left", box=box.SIMPLE_HEAD)


def preview(entry: Run | PruningPlan, where: str) -> Iterator[RenderableType]:
    """Tables and lines for a bound entry, or what it would do at once, at this place."""
    plan = entry if isinstance(entry, PruningPlan) else entry.pruning
    layers = entry.layers if isinstance(entry, PruningPlan) else entry.masked_layers
    yield _layers(layers, plan, where)
    if entry.spared:
        yield dense_line(entry.spared)
    if entry.misfits:
        yield misfits_message(entry.misfits)
    if plan is not None and plan.outside_blocks:
        yield f"outside the blocks, pruned after them: {', '.join(plan.outside_blocks)}"
    if plan is not None and plan.permute is not None:
        yield _folds(plan)
    if memory := entry.memory():
        lines = [f"{what}: {_size(nbytes)}" for what, nbytes in memory.items()]
        yield "memory: " + "; ".join(lines)
    if plan is not None:
        yield from _passes(plan)


def timetable(run: Run, where: str, steps_per_epoch: int | None) -> Table:
    """What happens when."""
    table = table_of("after step", *(["epoch"] if steps_per_epoch else []), "what", title=where)
    for step, what in run.timetable():
        step = max(1, step)  # what is due at 0 happens after the first
        epoch = [f"{step / steps_per_epoch:.2f}"] if steps_per_epoch else []
        table.add_row(str(step), *epoch, what)
    return table


def goal(plan: PruningPlan, final: float | None) -> str:
    """How sparse the layers will be in the end; ``final`` is None where a pattern or table says."""
    method = plan.method
    share = method.pattern.fixed if method.pattern.fixed is not None else final
    how = "by table" if share is None else f"{share:.4f}"
    return f"in the end: {method.pruner.name} to {method.pattern}, sparsity {how}"


def _folds(plan: PruningPlan) -> Table:
    table = table_of("input channels of", "permutation", title="permutations to be folded in")
    for fold in plan.folds.folds:
        groups, copies, width = fold.positions.shape
        parts = f"{groups} x {width} channels" if groups > 1 else f"{width} channels"
        also = f", {copies} copies" if copies > 1 else ""
        table.add_row(fold.name, f"{fold.kind}: {parts}{also}, {len(fold.slots)} tensors move")
    for name, reason in plan.folds.refused.items():
        table.add_row(name, f"none: {reason}")
    return table


def _layers(layers: Sequence[Layer], plan: PruningPlan | None, where: str) -> Table:
    stats = {} if plan is None else plan.measurements().stats
    columns = ["layer", "kind", "shape", "weights", *(["statistics"] if stats else [])]
    table = table_of(*columns, title=f"{where}: {len(layers)} layers")
    for layer in layers:
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


def _passes(plan: PruningPlan) -> Iterator[str]:
    measured = plan.measurements()
    if len(measured.groups) > 1 and plan.sequential is None:
        whole = sum(stat.nbytes for stat in measured.stats.values())
        yield (
            f"statistics of {_size(whole)} in {len(measured.groups)} groups, one at a time: "
            f"{plan.passes()} passes over the calibration data in each pruning step"
        )
