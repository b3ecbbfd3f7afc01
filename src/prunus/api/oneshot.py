"""Pruning a finished model: `prune` once, `sweep` over sparsities."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from prunus.allocators import ALLOCATORS, Allocator, Table
from prunus.api.results import Evaluate, Result, SweepResult
from prunus.calibration.batch_norm import put_back
from prunus.calibration.batch_norm import recalibrate as estimate_norms
from prunus.calibration.calibration import Calibration
from prunus.core.layers import reshard
from prunus.core.patterns import parse_pattern
from prunus.core.progress import track
from prunus.core.selection import select
from prunus.engine import step as engine
from prunus.engine.method import Method
from prunus.engine.permute.step import Permute
from prunus.engine.sequential.walk import Sequential
from prunus.modifiers import Context, PruningModifier, PruningRun, pruning_event
from prunus.modifiers.base import log
from prunus.pruners import PRUNERS, Pruner
from prunus.recipe import Recipe
from prunus.recipe.files import ENDINGS, is_text
from prunus.report.records import Recorder, number, start_event

AllocatorLike = str | Mapping[str, float] | Allocator | None


def as_pruner(pruner: str | Pruner) -> Pruner:
    """A pruner by name with its defaults, or itself. Raises ValueError for anything else."""
    if isinstance(pruner, str):
        return PRUNERS[pruner]()
    if isinstance(pruner, type) or not isinstance(pruner, Pruner):
        raise ValueError(
            f"{pruner!r} is no pruner; give a name ({', '.join(PRUNERS)}), "
            "an object such as prunus.Magnitude(), or a recipe"
        )
    return pruner


def as_allocator(allocator: AllocatorLike) -> Allocator | None:
    """An allocator by name, a table of names to sparsities, or itself."""
    if isinstance(allocator, str):
        return ALLOCATORS[allocator]()
    if isinstance(allocator, Mapping):
        return Table(allocator)
    if isinstance(allocator, type) or not (allocator is None or isinstance(allocator, Allocator)):
        raise ValueError(f"{allocator!r} is no allocator; one of: {', '.join(ALLOCATORS)}")
    return allocator


def as_recipe(
    pruner: str | os.PathLike[str] | Pruner | Recipe,
    sparsity: float | None,
    pattern: str | None,
    layers: Sequence[str] | str | None,
    exclude: Sequence[str] | str,
    allocator: AllocatorLike,
    permute: str | Permute | None,
) -> Recipe:
    """The recipe that a call of `prune` stands for."""
    name = os.fspath(pruner) if isinstance(pruner, str | os.PathLike) else ""
    if isinstance(pruner, Recipe | os.PathLike) or name.endswith(ENDINGS) or is_text(name):
        settings = {"pattern": pattern, "layers": layers, "exclude": exclude}
        settings |= {"allocator": allocator, "permute": permute}  # type: ignore[dict-item]
        if clash := [key for key, value in settings.items() if value]:
            raise ValueError(f"{', '.join(clash)} belong in the recipe, which was given as well")
        overrides: dict[str, Any] = {} if sparsity is None else {"sparsity": sparsity}
        return Recipe.load(cast("str | Recipe", pruner), **overrides)
    modifier = PruningModifier(
        pruner=as_pruner(pruner),
        sparsity=None if sparsity is None else float(sparsity),  # of numpy, maybe
        layers=_names(layers) if layers is not None else None,
        exclude=_names(exclude),
        pattern=pattern or "unstructured",
        allocator=as_allocator(allocator),
        permute=Permute(permute) if isinstance(permute, str) else permute,
    )
    return Recipe((modifier,))


def _names(patterns: Sequence[str] | str | None) -> tuple[str, ...]:
    names = (patterns,) if isinstance(patterns, str) else tuple(patterns or ())
    if bad := [name for name in names if not isinstance(name, str)]:
        raise ValueError(f"layers and exclude take names of layers and classes, not {bad[0]!r}")
    return names


def prune(
    model: nn.Module,
    pruner: str | os.PathLike[str] | Pruner | Recipe,
    *,
    sparsity: float | None = None,
    pattern: str | None = None,
    layers: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str = (),
    allocator: AllocatorLike = None,
    calibration: Calibration | None = None,
    recalibrate: bool | Calibration = False,
    sequential: bool | str | Sequential = False,
    permute: str | Permute | None = None,
    output_dir: str | os.PathLike[str] | None = None,
) -> Result:
    """Prune a model in place, at once.

    ``pruner`` is a name (`list_pruners`), a pruner object, or a recipe (a path, YAML text or
    `Recipe`), of which the ``prune`` entries are applied at their final sparsity; ``sparsity`` then
    overrides the recipe's variable of that name. ``layers`` and ``exclude`` take names, globs,
    class names and ``re:`` regexes; the default spares the stem and the output head.
    ``allocator`` is a name, an object, or a table of layer names to sparsities. ``recalibrate``
    estimates BatchNorm statistics anew on the pruned model, from the calibration data or from data
    of its own, which wants batches of some tens of examples and no labels. ``sequential`` prunes
    block by block, each on the outputs of the pruned ones before it: the name of the list of
    blocks, True to find it, or a `Sequential` that says where the blocks are meanwhile.
    ``permute``, for N:M, regroups input channels first: `lsa`, `reallocate`, or a `Permute`.

    Raises ValueError with the remedy if anything does not fit; the model is then untouched, as it
    is after an interrupt, and ``output_dir`` too.
    """
    recipe = as_recipe(pruner, sparsity, pattern, layers, exclude, allocator, permute)
    modifiers = [m for m in recipe.modifiers if isinstance(m, PruningModifier)]
    for modifier in recipe.modifiers:
        if not modifier.one_shot:
            log.info("%s needs training; left out of a one-shot run", modifier.name)
    if not modifiers:
        raise ValueError("the recipe has no 'prune' entry; nothing to do at once")
    recorder = Recorder()
    context = Context(
        model,
        None,
        calibration=calibration,
        one_shot=True,
        record=recorder,
        sequential=Sequential.of(sequential),
    )
    runs = [cast("PruningRun", modifier.bind(context)) for modifier in modifiers]
    _check_together(modifiers, context)
    norms = _norms_data(recalibrate, calibration)
    recorder(start_event(model, 0, recipe=recipe.to_yaml()))
    try:
        for run in runs:
            run.start()
            run.finish(0)
        if norms is not None:
            estimate_norms(model, norms)
        if output_dir is not None:
            recorder.save(output_dir)
    except BaseException:
        for run in reversed(runs):
            run.result.undo()
        raise
    rows = {row.name: row for run in runs for row in run.rows}
    left_dense = [name for name in runs[0].left_dense if name not in rows]
    result = Result(list(rows.values()), dict(context.masks), recipe, left_dense, recorder)
    for run in runs:
        for folded in run.result.folded:
            result.permuted += folded.rows
            result.not_permuted |= folded.refused
        result.not_permuted |= run.folds.refused
    return result


def _check_together(modifiers: Sequence[PruningModifier], context: Context) -> None:
    """Raises ValueError for entries that no later entry can follow."""
    if len(modifiers) > 1 and context.sequential is not None and context.sequential.folder:
        raise ValueError(
            "sequential: a folder holds the blocks of one 'prune' entry, and the recipe has "
            f"{len(modifiers)}; join them, or leave out folder"
        )
    if any(modifier.permute is not None for modifier in modifiers[1:]):
        raise ValueError(
            "permute would move weights that are pruned already; let it be in the first 'prune'"
        )


def _norms_data(
    recalibrate: bool | Calibration, calibration: Calibration | None
) -> Calibration | None:
    if recalibrate is True and calibration is None:
        raise ValueError("recalibrate needs data; pass calibration=, or a Calibration of its own")
    return calibration if recalibrate is True else recalibrate or None


@torch.no_grad()
def _restore(model: nn.Module, saved: Sequence[tuple[Tensor, Tensor]]) -> None:
    reshard(model)
    for weight, old in saved:
        weight.copy_(old)


def sweep(
    model: nn.Module,
    pruner: str | Pruner,
    sparsities: Iterable[float],
    evaluate: Evaluate,
    *,
    pattern: str = "unstructured",
    layers: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str = (),
    allocator: AllocatorLike = None,
    calibration: Calibration | None = None,
    recalibrate: bool | Calibration = False,
) -> SweepResult:
    """Prune to each sparsity, call ``evaluate(model)``, and put the weights back bit for bit.

    Statistics and scores are computed once and serve all sparsities; one copy of the pruned weights
    is kept meanwhile. ``evaluate`` returns a number, or a mapping of names to numbers. The other
    arguments are those of `prune`.
    """
    sparsities = [float(sparsity) for sparsity in sparsities]
    if not sparsities:
        raise ValueError("no sparsities were given; give at least one, such as [0.5, 0.75]")
    method = Method(
        as_pruner(pruner),
        parse_pattern(pattern),
        as_allocator(allocator) or ALLOCATORS[as_pruner(pruner).allocator](),
    )
    if bad := [s for s in sparsities if not 0 <= s <= 1]:
        raise ValueError(f"sparsity {bad[0]:g} is not between 0 and 1")
    if method.pattern.fixed is not None:
        raise ValueError(f"pattern '{pattern}' has one sparsity only; use prune instead of sweep")
    chosen = select(model, None if layers is None else _names(layers), _names(exclude))
    fitted = method.fit(chosen.layers)
    engine.check_reachable(fitted, method.pattern, min(sparsities))
    prune_to = engine.prepare_sweep(method, fitted, model, calibration)
    norms = _norms_data(recalibrate, calibration)
    saved = [(layer.local, layer.local.clone()) for layer in fitted]
    recorder, values = Recorder(), {}
    recorder(start_event(model, 0))
    try:
        for sparsity in track(sparsities, "sweep"):
            changes = prune_to(sparsity)
            modifier = PruningModifier(method.pruner, sparsity, pattern=pattern)
            rows = [change.row for change in changes]
            del changes
            with put_back(model, always=True):
                if norms is not None:
                    estimate_norms(model, norms)
                metrics = _metrics(evaluate(model))
            values[sparsity] = metrics
            event = pruning_event(modifier, rows, 0, sparsity)
            recorder({**event, "event": "sweep", "values": metrics})
            _restore(model, saved)
    finally:
        _restore(model, saved)
    return SweepResult(values, recorder)


def _metrics(value: Any) -> dict[str, float]:
    metrics = value if isinstance(value, Mapping) else {"value": value}
    return {str(name): number(metric) for name, metric in metrics.items()}
