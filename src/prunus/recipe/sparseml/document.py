"""From a file of SparseML's to its modifiers, with variables filled in.

What a file may look like: front matter of Markdown, one modifier, a list of them, a mapping whose
lists stand under keys that contain ``modifiers``, or stages of such mappings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prunus.core.names import did_you_mean
from prunus.recipe.errors import Path, RecipeError, Source
from prunus.recipe.sparseml.equations import Variables
from prunus.recipe.yaml import Tagged

GROUP = "modifiers"
_RECIPE = re.compile(r"^(?:\w*modifiers\w*:|\s*(?:-\s+)?!\S*Modifier)", re.M)


@dataclass(frozen=True)
class Entry:
    """One modifier of the file."""

    tag: str
    settings: Mapping[str, Any]
    path: Path


def front_matter(text: str, name: str, markdown: bool = False) -> str:
    """The YAML between two lines of ``---`` or ``+++``, on the lines where it stood.

    A text that is no Markdown is returned as it is unless it begins so (after comments of HTML).
    Raises RecipeError for Markdown without it, and for a file of YAML with a second recipe.
    """
    lines = text.splitlines()
    marks = [i for i, line in enumerate(lines) if line.rstrip() in ("---", "+++")]
    before = "\n".join(lines[: marks[0]]) if marks else text
    begins = not re.sub(r"<!--.*?-->", "", before, flags=re.S).strip()
    if len(marks) > 1 and (begins or markdown):
        rest = "\n".join(lines[marks[1] + 1 :])
        if name.lower().endswith((".yaml", ".yml")) and _RECIPE.search(rest):
            where = f"{name}:{marks[1] + 1}"
            raise RecipeError(f"{where}: a second recipe begins here; give it a file of its own")
        return "\n" * (marks[0] + 1) + "\n".join(lines[marks[0] + 1 : marks[1]])
    if markdown:
        raise RecipeError(f"{name}: no recipe between two lines of '---' or '+++' at its top")
    return text


def is_sparseml(data: Any) -> bool:
    """Whether there is a modifier with a tag in it."""
    if isinstance(data, Mapping):
        return any(is_sparseml(value) for value in data.values())
    return isinstance(data, Tagged) or (isinstance(data, list) and any(map(is_sparseml, data)))


def refuse_newer(data: Any, source: Source, path: Path = ()) -> None:
    """Raises RecipeError for the kind of recipe that came after SparseML 1.x: names as keys."""
    for key, value in data.items() if isinstance(data, Mapping) else ():
        if key.endswith("Modifier"):
            raise source.error(
                (*path, key),
                "a recipe of the kind that llm-compressor reads, with modifiers as keys; prunus "
                f"reads those of SparseML 1.x, with tags such as !{key}",
            )
        refuse_newer(value, source, (*path, key))


def is_stage(value: Any) -> bool:
    return isinstance(value, dict) and any(GROUP in key for key in value)


def entries(data: Any, overrides: Mapping[str, Any], source: Source) -> list[Entry]:
    """The modifiers of the file in its order.

    Raises RecipeError for unknown overrides, modifiers at a place where SparseML finds none, and
    equations that cannot be worked out.
    """
    if isinstance(data, Tagged | list):
        _check_overrides({}, {}, overrides, source)
        return list(_listed(data, Variables({}, source, ()), source, ()))
    if not isinstance(data, dict):
        raise source.error((), "expected modifiers, such as '- !GMPruningModifier {...}'")
    stages = {key: value for key, value in data.items() if is_stage(value)}
    _check_overrides(data, stages, overrides, source)
    top = {key: value for key, value in data.items() if key not in stages}
    variables = _variables(top, overrides, source, ())
    found = list(_modifiers(top, variables, source, ()))
    for name, stage in stages.items():
        own = _variables(stage, overrides, source, (name,), variables)
        found += _modifiers(stage, own, source, (name,))
    if not found:
        raise source.error((), f"no modifiers; they stand in lists under keys with {GROUP!r}")
    return found


def _is_variable(value: Any) -> bool:
    return not is_sparseml(value) and not is_stage(value)


def _check_overrides(
    data: Mapping[str, Any],
    stages: Mapping[str, Any],
    overrides: Mapping[str, Any],
    source: Source,
) -> None:
    levels = [data, *stages.values()]
    known = [key for level in levels for key, value in level.items() if _is_variable(value)]
    for name in overrides:
        if name not in known:
            hint = did_you_mean(name, known) or "; the recipe has no variables"
            raise RecipeError(f"{source.name}: unknown variable {name!r}{hint}")


def _variables(
    level: Mapping[str, Any],
    overrides: Mapping[str, Any],
    source: Source,
    path: Path,
    outer: Variables | None = None,
) -> Variables:
    values = {key: overrides.get(key, value) for key, value in level.items() if _is_variable(value)}
    return Variables(values, source, path, outer)


def _modifiers(
    level: Mapping[str, Any], variables: Variables, source: Source, path: Path
) -> Iterator[Entry]:
    for key, value in level.items():
        here = (*path, key)
        if isinstance(value, Tagged) or (isinstance(value, list) and GROUP in key):
            yield from _listed(value, variables, source, here)
        elif is_sparseml(value):
            remedy = f"call it {key + '_' + GROUP!r}"
            raise source.error(here, f"a list of modifiers needs {GROUP!r} in its name; {remedy}")


def _listed(
    value: Tagged | list[Any], variables: Variables, source: Source, path: Path
) -> Iterator[Entry]:
    """The entries of a list of modifiers; a single one is a list of itself."""
    if isinstance(value, Tagged):
        yield Entry(value.tag, variables.fill(dict(value.settings), path), path)
        return
    for i, item in enumerate(value):
        if not isinstance(item, Tagged):
            raise source.error((*path, i), "expected a modifier, such as '!GMPruningModifier'")
        yield from _listed(item, variables, source, (*path, i))
