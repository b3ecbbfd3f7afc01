"""Entries as recipes of version 0.1 wrote them, in the words of today."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from prunus.core.patterns import parse_pattern
from prunus.modifiers import MODIFIERS
from prunus.recipe.errors import Path, Source

Entry = tuple[str, dict[str, Any]]
_NM_KEYS = ("pattern", "masking", "structure", "layers", "exclude", "window")


def renamed(name: str, settings: Mapping[str, Any], source: Source, path: Path) -> Entry:
    """The name and the settings of an entry, with a FutureWarning where they have changed.

    Raises RecipeError for settings that never went together.
    """
    if name == "accelerate" and "accelerate" not in MODIFIERS:
        _warn(source, path, "the entry 'accelerate' is now called 'semi_sparse'")
        return "semi_sparse", dict(settings)
    masking = settings.get("masking")
    if name not in ("prune", "acdc", "movement") or not {"masking", "structure"} & set(settings):
        return name, dict(settings)
    if masking in (None, "hard", {"name": "hard"}):
        if settings.get("structure"):
            message = "'structure' is for N:M training; use the entry 'nm_training'"
            raise source.error((*path, "structure"), message)
        _warn(source, path, "the key 'masking' is gone: hard is what 'prune' does")
        gone = ("masking", "structure")
        return name, {key: value for key, value in settings.items() if key not in gone}
    if name != "prune":
        raise source.error((*path, "masking"), f"'{name}' masks hard; drop 'masking'")
    _warn(source, path, "'prune' with 'masking' is now the entry 'nm_training'")
    return "nm_training", _nm_training(settings, source, path)


def _nm_training(settings: Mapping[str, Any], source: Source, path: Path) -> dict[str, Any]:
    pattern = str(settings.get("pattern", "unstructured"))
    if settings.get("pruner", "magnitude") not in ("magnitude", {"name": "magnitude"}):
        raise source.error((*path, "pruner"), "N:M training chooses by magnitude; drop 'pruner'")
    if "sparsity" in settings and settings["sparsity"] != parse_pattern(pattern).fixed:
        raise source.error((*path, "sparsity"), f"pattern '{pattern}' fixes it; drop 'sparsity'")
    for key, value in settings.items():
        if key not in (*_NM_KEYS, "pruner", "sparsity") and value:
            raise source.error((*path, key), f"{key!r} means nothing in N:M training; drop it")
    return {"pattern": pattern, **{key: settings[key] for key in _NM_KEYS if key in settings}}


def _warn(source: Source, path: Path, message: str) -> None:
    warnings.warn(source.message(path, message), FutureWarning, stacklevel=2)
