"""What calls may write in place of objects: names, tables, text."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, cast

from prunus.allocators import ALLOCATORS, Allocator, Table
from prunus.calibration.calibration import Calibration, as_calibration
from prunus.core.ranks import all_ranks
from prunus.engine.fitting import Misfits
from prunus.engine.method import Unreached
from prunus.engine.permute.step import Permute
from prunus.modifiers import PruningModifier
from prunus.pruners import PRUNERS, Pruner
from prunus.recipe import Recipe
from prunus.recipe.files import ENDINGS, is_text

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
    permute: bool | str | Permute | None,
    misfits: Misfits,
    unreached: Unreached,
) -> Recipe:
    """The recipe that a call of `prune` stands for."""
    name = os.fspath(pruner) if isinstance(pruner, str | os.PathLike) else ""
    if isinstance(pruner, Recipe | os.PathLike) or name.endswith(ENDINGS) or is_text(name):
        settings = {"pattern": pattern, "layers": layers, "exclude": exclude}
        settings |= {"allocator": allocator, "permute": permute}  # type: ignore[dict-item]
        choices = {"misfits": misfits, "unreached": unreached}
        settings |= {key: value for key, value in choices.items() if value != "error"}
        if clash := [key for key, value in settings.items() if value]:
            raise ValueError(f"{', '.join(clash)} belong in the recipe, which was given as well")
        overrides: dict[str, Any] = {} if sparsity is None else {"sparsity": sparsity}
        return Recipe.load(cast("str | Recipe", pruner), **overrides)
    modifier = PruningModifier(
        pruner=as_pruner(pruner),
        sparsity=None if sparsity is None else float(sparsity),  # of numpy, maybe
        layers=as_names(layers) if layers is not None else None,
        exclude=as_names(exclude),
        pattern=pattern or "unstructured",
        allocator=as_allocator(allocator),
        permute=as_permute(permute),
        misfits=misfits,
        unreached=unreached,
    )
    return Recipe((modifier,))


def as_permute(permute: bool | str | Permute | None) -> Permute | None:
    if isinstance(permute, str):
        return Permute(permute)
    if permute is None or isinstance(permute, bool):
        return Permute() if permute else None
    if not isinstance(permute, Permute):
        raise ValueError(f"permute={permute!r}; use True, 'lsa', 'reallocate' or a prunus.Permute")
    return permute


def as_names(patterns: Sequence[str] | str | None) -> tuple[str, ...]:
    names = (patterns,) if isinstance(patterns, str) else tuple(patterns or ())
    if bad := [name for name in names if not isinstance(name, str)]:
        raise ValueError(f"layers and exclude take names of layers and classes, not {bad[0]!r}")
    return names


def norms_data(
    recalibrate: bool | Calibration, calibration: Calibration | None
) -> Calibration | None:
    if recalibrate is True and calibration is None:
        raise ValueError("recalibrate needs data; pass calibration=, or a Calibration of its own")
    return calibration if recalibrate is True else recalibrate or None


def check_same_on_all_ranks(calibration: Any, **more: Any) -> None:
    """Raises ValueError, on all ranks, where they were given different things to do.

    They share the work of each layer, so they would wait for each other for ever.
    """
    data = as_calibration(calibration)
    given = [data.loss_fn, data.forward] if data is not None else []
    calls = ["none" if x is None else "given" for x in given]
    all_ranks().check_same(
        **more,
        calibration="none" if data is None else f"given, loss_fn {calls[0]}, forward {calls[1]}",
    )
