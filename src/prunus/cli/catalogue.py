"""What `prunus list` and `prunus show` print: all registered names, and their settings."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from prunus.allocators import ALLOCATORS
from prunus.cli.preview import table_of
from prunus.core.names import Registry, did_you_mean
from prunus.modifiers import MODIFIERS
from prunus.modifiers.nm.maskings import MASKINGS
from prunus.modifiers.schedules import CURVES
from prunus.pruners import PRUNERS
from prunus.recipe.files import shipped_recipes
from prunus.recipe.schema import class_schema
from prunus.stats import STATISTICS

REGISTRIES: dict[str, Registry[Any]] = {
    "pruner": PRUNERS,
    "allocator": ALLOCATORS,
    "modifier": MODIFIERS,
    "statistic": STATISTICS,
    "masking": MASKINGS,
}
PATTERNS = {
    "unstructured": "any weight may go",
    "row": "every output keeps the same number of inputs",
    "2:4": "N kept of every M consecutive input channels, any N and M",
    "2:4 along outputs": "N kept of every M outputs; by magnitude, or in N:M training",
    "4x1": "blocks of outputs x inputs go together, any size",
}


def listing() -> Iterator[RenderableType]:
    """All names, with a line on each."""
    table = table_of("kind", "name", "what it does")
    for kind, registry in REGISTRIES.items():
        for name in registry:
            table.add_row(kind, name, _description(registry[name]).split("\n")[0])
        table.add_section()
    for pattern, message in PATTERNS.items():
        table.add_row("pattern", pattern, message)
    yield table
    yield f"curves of schedules: {', '.join([*CURVES, 'steps', 'cyclic'])}"


def shipped_listing() -> Iterator[RenderableType]:
    """The recipes that come with the package, with the comment that each begins with."""
    table = table_of("recipe", "what it does")
    for name, path in shipped_recipes().items():
        first = path.read_text(encoding="utf-8").split("\n")[0]
        table.add_row(name, first.removeprefix("#").strip() if first.startswith("#") else "")
    yield table


def description(name: str) -> Iterator[RenderableType]:
    """What a name stands for, with its settings.

    Raises ValueError for one that no registry knows.
    """
    found = [(kind, registry[name]) for kind, registry in REGISTRIES.items() if name in registry]
    if not found:
        known = [n for registry in REGISTRIES.values() for n in registry]
        raise ValueError(f"nothing is called {name!r}{did_you_mean(name, known)}")
    for kind, cls in found:
        yield Text(f"{kind} {name}", style="bold")
        yield Text(_description(cls))
        if kind == "pruner":
            yield f"patterns: {', '.join(cls.patterns)}; allocator: {cls.allocator}"
        yield f"reads {cls.reads}" if kind == "statistic" else _settings(cls)


def _settings(cls: Any) -> Table | str:
    properties = class_schema(cls).get("properties", {})
    if not properties:
        return "no settings"
    table = table_of("setting", "default", "meaning")
    defaults = {f.name.rstrip("_"): f for f in dataclasses.fields(cls)}
    for key, schema in properties.items():
        table.add_row(key, _default(defaults[key]), schema.get("description", ""))
    return table


def _description(cls: type) -> str:
    text = (inspect.getdoc(cls) or "").split("\n\n>>>")[0]  # without its example
    return text.replace("``", "").replace("`", "'")


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
        return str(getattr(value, "name", value))
    return "required" if field.default is dataclasses.MISSING else str(field.default)
