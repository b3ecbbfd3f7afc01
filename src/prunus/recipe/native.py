"""The recipe: an immutable list of modifiers, read from YAML or written in Python.

variables: {sparsity: 0.75}
modifiers:
  - prune:
      pruner: magnitude
      sparsity: {from: 0.3, to: "${sparsity}", curve: cubic}
      window: {from: 0ep, to: 16ep, every: 2ep}
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from prunus.modifiers import MODIFIERS, Modifier
from prunus.names import did_you_mean
from prunus.recipe.build import build_named, dump
from prunus.recipe.errors import RecipeError, Source
from prunus.recipe.yaml import read_yaml, substitute


def is_text(recipe: str) -> bool:
    """Whether this is the text of a recipe, not the path of one."""
    return "\n" in recipe or "modifiers:" in recipe


@dataclass(frozen=True)
class Recipe:
    """What to do to a model and when. Equal recipes have equal modifiers."""

    modifiers: tuple[Modifier, ...]

    def __post_init__(self) -> None:
        if not self.modifiers:
            raise ValueError("a recipe needs at least one modifier")

    @classmethod
    def load(cls, recipe: str | os.PathLike[str] | Recipe, /, **overrides: Any) -> Recipe:
        """From a file, or from YAML text (anything of more lines or with ``modifiers:`` in it).

        ``overrides`` replace the recipe's ``variables``. Raises RecipeError, naming file, line
        and path, for whatever is wrong; FileNotFoundError with near names for a missing file.
        """
        if isinstance(recipe, Recipe):
            if overrides:
                raise ValueError("overrides go with a file or text, not with a built Recipe")
            return recipe
        if isinstance(recipe, str) and is_text(recipe):
            return cls.from_yaml(recipe, **overrides)
        path = Path(recipe)
        if not path.is_file():
            beside = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
            near = difflib.get_close_matches(path.name, beside, n=1)
            hint = f"; did you mean '{path.parent / near[0]}'?" if near else ""
            raise FileNotFoundError(f"no recipe file '{path}'{hint}")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise RecipeError(f"{path}: not UTF-8 text: {error.reason}") from None
        return cls.from_yaml(text, str(path), **overrides)

    @classmethod
    def from_yaml(cls, text: str, name: str = "recipe", /, **overrides: Any) -> Recipe:
        """From YAML text; ``name`` stands for the file in errors."""
        data, source = read_yaml(text, name)
        if not isinstance(data, Mapping):
            raise source.error((), "a recipe is a mapping with the key 'modifiers'")
        for key in data:
            if key not in ("variables", "modifiers"):
                hint = did_you_mean(key, ["variables", "modifiers"])
                raise source.error((key,), f"unknown key {key!r}{hint}")
        variables = _variables(data.get("variables") or {}, overrides, source)
        modifiers = substitute(data.get("modifiers"), variables, source, ("modifiers",))
        return cls(_modifiers(modifiers, source))

    def to_yaml(self) -> str:
        """YAML that loads to an equal recipe, variables filled in and defaults left out."""
        entries = [{modifier.name: dump(modifier)} for modifier in self.modifiers]
        return yaml.dump({"modifiers": entries}, Dumper=_Dumper, sort_keys=False, width=100)


class _Dumper(yaml.SafeDumper):
    """SafeDumper without anchors, whose floats every reader of YAML takes for floats."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    mantissa, e, exponent = repr(value).partition("e")
    point = "" if not e or "." in mantissa else ".0"  # YAML 1.1 reads 1e-05 as text
    return dumper.represent_scalar("tag:yaml.org,2002:float", mantissa + point + e + exponent)


_Dumper.add_representer(float, _float)


def _variables(declared: Any, overrides: dict[str, Any], source: Source) -> dict[str, Any]:
    if not isinstance(declared, Mapping):
        raise source.error(("variables",), "expected a mapping of names to values")
    for name in overrides:
        if name not in declared:
            hint = did_you_mean(name, declared) or "; the recipe declares no variables"
            raise RecipeError(f"{source.name}: unknown variable {name!r}{hint}")
    for name, value in declared.items():
        if isinstance(value, str) and "${" in value and name not in overrides:
            raise source.error(("variables", name), "variables cannot refer to other variables")
    return {**declared, **overrides}


def _modifiers(entries: Any, source: Source) -> tuple[Modifier, ...]:
    if not isinstance(entries, list) or not entries:
        raise source.error(("modifiers",), "expected a list of modifiers, such as '- prune: {...}'")
    built = []
    for i, entry in enumerate(entries):
        path = ("modifiers", i)
        if not isinstance(entry, Mapping) or len(entry) != 1:
            raise source.error(path, "expected one modifier, such as 'prune: {...}'")
        name, arguments = next(iter(entry.items()))
        if name not in MODIFIERS:
            hint = did_you_mean(name, MODIFIERS)
            raise source.error((*path, name), f"unknown modifier {name!r}{hint}")
        if arguments is not None and not isinstance(arguments, Mapping):
            raise source.error((*path, name), "expected a mapping of its settings")
        if "name" in (arguments or {}):
            raise source.error((*path, name, "name"), "unknown key 'name'")
        built.append(
            build_named(MODIFIERS, {"name": name, **(arguments or {})}, source, (*path, name))
        )
    return tuple(built)
