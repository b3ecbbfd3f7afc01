"""The recipe: an immutable list of modifiers, read from YAML or written in Python.

epochs: 20
variables: {sparsity: 0.75}
modifiers:
  - prune:
      pruner: magnitude
      sparsity: {from: 0.3, to: "${sparsity}", curve: cubic}
      window: {from: 0ep, to: 16ep, every: 2ep}
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from prunus.core.names import did_you_mean
from prunus.core.numbers import shortened
from prunus.modifiers import MODIFIERS, Modifier
from prunus.modifiers.timing import check_epochs
from prunus.recipe.build import build_named, dump
from prunus.recipe.errors import RecipeError, Source
from prunus.recipe.files import parse, text_of
from prunus.recipe.renamed import renamed
from prunus.recipe.sparseml import is_sparseml, log_notes, read, refuse_newer
from prunus.recipe.yaml import substitute

KEYS = ("epochs", "variables", "modifiers")


@dataclass(frozen=True)
class Recipe:
    """What to do to a model and when. Equal recipes have equal modifiers.

    >>> recipe = prunus.Recipe.load("modifiers: [{prune: {pruner: cap, sparsity: 0.75}}]")
    >>> recipe.modifiers[0].pruner.name, recipe.modifiers[0].sparsity
    ('cap', 0.75)
    """

    modifiers: tuple[Modifier, ...]
    epochs: float | None = None
    """the length of training the recipe is written for, which `attach` takes unless told another"""

    def __post_init__(self) -> None:
        if not self.modifiers and self.epochs is None:
            raise ValueError("a recipe needs at least one modifier")
        if self.epochs is not None:
            check_epochs(self.epochs)

    @classmethod
    def load(
        cls,
        recipe: str | os.PathLike[str] | Recipe,
        /,
        dialect: str | None = None,
        strict: bool = True,
        **overrides: Any,
    ) -> Recipe:
        """From a file, YAML text (anything of more lines or with ``modifiers:`` in it), or by name.

        Names are those of recipes that come with the package, as ``vit/magnitude-90``; `prunus list
        recipes` prints them.

        Recipes of SparseML 1.x and CAP (YAML, or Markdown with YAML at its top) are known by their
        tags and read into the same modifiers; ``dialect`` ('sparseml' or 'cap') says which of the
        two it is where the file does not show it. Without ``strict`` those of their modifiers that
        have no counterpart are left out, with a warning in the log.

        ``overrides`` replace the recipe's variables. Raises RecipeError, naming file, line
        and path, for whatever is wrong; FileNotFoundError with near names for a missing file.
        """
        if isinstance(recipe, Recipe):
            if overrides:
                raise ValueError("overrides go with a file or text, not with a built Recipe")
            return recipe
        return cls.from_yaml(*text_of(recipe), dialect=dialect, strict=strict, **overrides)

    @classmethod
    def from_yaml(
        cls,
        text: str,
        name: str = "recipe",
        /,
        dialect: str | None = None,
        strict: bool = True,
        **overrides: Any,
    ) -> Recipe:
        """From YAML text; ``name`` stands for the file in errors. The rest is as for `load`."""
        data, source = parse(text, name)
        if dialect is not None or is_sparseml(data):
            reading = read(data, source, dialect, strict, overrides)
            log_notes(reading, source)
            if not reading.modifiers and reading.epochs is None:
                raise source.error((), "none of its modifiers has a counterpart; nothing is left")
            return cls(reading.modifiers, reading.epochs)
        source.refuse_repeated()
        refuse_newer(data, source)
        if not isinstance(data, Mapping):
            raise source.error((), "a recipe is a mapping with the key 'modifiers'")
        for key in data:
            if key not in KEYS:
                raise source.error((key,), f"unknown key {key!r}{did_you_mean(key, KEYS)}")
        variables = _variables(data.get("variables") or {}, overrides, source)
        values = {
            key: substitute(data.get(key), variables, source, (key,)) for key in KEYS if key in data
        }
        epochs = _epochs(values.get("epochs"), source)
        if epochs is not None and "modifiers" not in values:
            return cls((), epochs)
        return cls(_modifiers(values.get("modifiers"), source), epochs)

    def to_yaml(self) -> str:
        """YAML that loads to an equal recipe, variables filled in and defaults left out."""
        data: dict[str, Any] = {} if self.epochs is None else {"epochs": dump(self.epochs)}
        if self.modifiers:
            data["modifiers"] = [{modifier.name: dump(modifier)} for modifier in self.modifiers]
        return yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=100)


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


def _epochs(value: Any, source: Source) -> float | None:
    if value is None:
        return None
    if isinstance(value, int | float):
        try:
            check_epochs(value)
            return value
        except ValueError:
            pass
    message = f"expected a positive number, not {shortened(value)}"
    raise source.error(("epochs",), message)


def _modifiers(entries: Any, source: Source) -> tuple[Modifier, ...]:
    if not isinstance(entries, list) or not entries:
        raise source.error(("modifiers",), "expected a list of modifiers, such as '- prune: {...}'")
    built = []
    for i, entry in enumerate(entries):
        path = ("modifiers", i)
        if not isinstance(entry, Mapping) or len(entry) != 1:
            raise source.error(path, "expected one modifier, such as 'prune: {...}'")
        name, arguments = next(iter(entry.items()))
        if arguments is None or isinstance(arguments, Mapping):
            name, arguments = renamed(name, arguments or {}, source, (*path, name))
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
