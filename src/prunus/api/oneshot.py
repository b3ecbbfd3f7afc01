"""`prune`: a finished model, pruned at once."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from torch import nn

from prunus.api.arguments import (
    AllocatorLike,
    as_recipe,
    check_same_on_all_ranks,
    norms_data,
)
from prunus.api.results import Result
from prunus.calibration.batch_norm import recalibrate as estimate_norms
from prunus.calibration.calibration import Calibration, as_calibration
from prunus.calibration.input_dependence import CONSTANT, InputDependence
from prunus.core.cut_paths import cut_message, cut_paths
from prunus.core.default_dense_layers import left_by_all
from prunus.core.mask_registry import Masks
from prunus.core.ranks import all_ranks
from prunus.core.unseen import told
from prunus.engine.fitting import Misfits
from prunus.engine.method import Unreached
from prunus.engine.permute.step import Permute
from prunus.engine.plan import PruningPlan
from prunus.engine.sequential.options import Sequential
from prunus.engine.sequential.walk import SequentialResult
from prunus.modifiers import MovementPruning, OneShotModifier
from prunus.modifiers.events import pruning_event
from prunus.pruners import Pruner
from prunus.recipe import Recipe
from prunus.report.records import Recorder, start_event

log = logging.getLogger("prunus")


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
    permute: bool | str | Permute | None = None,
    misfits: Misfits = "error",
    unreached: Unreached = "error",
    output_dir: str | os.PathLike[str] | None = None,
) -> Result:
    """Prune a model in place, at once.

    ``pruner`` is a name (`list_pruners`), a pruner object, or a recipe (a path, YAML text or
    `Recipe`), of which the ``prune`` entries are applied at their final sparsity; ``sparsity`` then
    overrides the recipe's variable of that name. ``layers`` and ``exclude`` take names, globs,
    class names and ``re:`` regexes; the default spares what reads the input or writes the output,
    and routers (``result.spared`` says which).
    ``allocator`` is a name, an object, or a table of layer names to sparsities. ``recalibrate``
    estimates BatchNorm statistics anew on the pruned model, from the calibration data or from data
    of its own, which wants batches of some tens of examples and no labels. ``sequential`` prunes
    block by block, each on the outputs of the pruned ones before it: the name of the list of
    blocks, True to walk all lists, or a `Sequential` that says where the blocks are meanwhile.
    ``permute``, for N:M, regroups input channels first: true, `lsa`, `reallocate`, or a `Permute`.
    ``misfits="dense"`` leaves layers dense that the pattern does not divide, or whose inputs cannot
    be measured; ``unreached`` says what becomes of layers about which the data tells nothing:
    `error`, `magnitude` or `dense`. The result names both.

    Where there is calibration data, the result also says whether the model's output has ceased to
    depend on its input.

    Raises ValueError with the remedy if anything does not fit, or data-parallel ranks were asked
    for different things; the model is then untouched, as it is after an interrupt, and
    ``output_dir`` too.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> result = prunus.prune(model, "ria", pattern="2:4", layers=["0"],
    ...                       calibration=prunus.Calibration([torch.randn(16, 8)]))
    >>> result.sparsity, int((model[0].weight == 0).sum())
    (0.5, 32)
    """
    with all_ranks().raise_on_all_ranks():
        calibration = as_calibration(calibration)
        recipe = as_recipe(
            pruner, sparsity, pattern, layers, exclude, allocator, permute, misfits, unreached
        )
        modifiers = _one_shot(recipe)
        walk = Sequential.of(sequential)
    blocks = "no" if walk is None else f"yes, {walk.blocks}"
    check_same_on_all_ranks(calibration, recipe=recipe.to_yaml(), sequential=blocks)
    _check_together(modifiers, walk)
    plans = [modifier.plan(model, calibration, walk) for modifier in modifiers]
    for plan in plans:
        plan.check_data()
    norms = norms_data(recalibrate, calibration)
    # block by block the model may not fit where it would have to run
    depends = InputDependence(model, None if any(p.sequential for p in plans) else calibration)
    depends.ask_before()
    cut_before = cut_paths(model)
    recorder, masks, done = Recorder(), Masks(), list[SequentialResult]()
    spared = left_by_all((plan.spared, plan.layers) for plan in plans)
    recorder(start_event(model, 0, recipe=recipe.to_yaml(), left_dense=spared))
    try:
        for modifier, plan in zip(modifiers, plans, strict=True):
            target = modifier.final_sparsity
            plan.check_reachable(target)
            done.append(plan.prune(target))
            for change in done[-1].changes:
                masks.put(change.layer, change.mask)
            method = plan.method.pruner.name, str(plan.method.pattern)
            recorder(pruning_event(*method, done[-1].rows, 0, target, plan.misfits))
        if norms is not None:
            estimate_norms(model, norms)
        if constant := depends.lost:
            log.warning("%s", CONSTANT)
            recorder({"event": "constant_output", "step": 0})
        if cut := [name for name in cut_paths(model) if name not in cut_before]:
            log.warning("%s", cut_message(cut))
            recorder({"event": "cut", "step": 0, "layers": cut})
        if output_dir is not None:
            recorder.save(output_dir)
    except BaseException:
        for each in reversed(done):
            each.undo()
        raise
    result = _result(recipe, plans, done, masks, spared, recorder)
    result.constant_output, result.cut = constant, cut
    return result


def _one_shot(recipe: Recipe) -> list[OneShotModifier]:
    """The modifiers that a finished model takes. Raises ValueError if there are none."""
    modifiers = [m for m in recipe.modifiers if m.one_shot and isinstance(m, OneShotModifier)]
    for modifier in recipe.modifiers:
        if modifier not in modifiers:
            log.info("%s needs training; left out of a one-shot run", modifier.name)
    if modifiers:
        return modifiers
    if any(isinstance(m, MovementPruning) for m in recipe.modifiers):
        raise ValueError(
            "movement pruning watches training and has nothing to go by at once; attach the "
            "recipe to an optimizer, or use another pruner"
        )
    raise ValueError("the recipe has no 'prune' entry; nothing to do at once")


def _result(
    recipe: Recipe,
    plans: Sequence[PruningPlan],
    done: Sequence[SequentialResult],
    masks: Masks,
    spared: dict[str, str],
    recorder: Recorder,
) -> Result:
    rows = {row.name: row for each in done for row in each.rows}
    result = Result(list(rows.values()), dict(masks), recipe, spared, recorder)
    result.unseen = told(plans[0].model)
    for plan, each in zip(plans, done, strict=True):
        result.misfits |= {name: why for name, why in plan.misfits.items() if name not in rows}
        for folded in each.folded:
            result.permuted += folded.rows
            result.not_permuted |= folded.refused
        result.outside_blocks += each.outside
        result.not_permuted |= plan.folds.refused
    return result


def _check_together(modifiers: Sequence[OneShotModifier], walk: Sequential | None) -> None:
    """Raises ValueError for entries that no later entry can follow."""
    if len(modifiers) > 1 and walk is not None and walk.folder:
        raise ValueError(
            "sequential: a folder holds the blocks of one 'prune' entry, and the recipe has "
            f"{len(modifiers)}; join them, or leave out folder"
        )
    if any(getattr(modifier, "permute", None) is not None for modifier in modifiers[1:]):
        raise ValueError(
            "permute would move weights that are pruned already; let it be in the first 'prune'"
        )
