"""Plain values to the frozen dataclasses they stand for, and back, and the JSON schema of both.

The dataclasses know nothing of recipes; pydantic checks the types of their fields here.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
import re
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prunus.allocators import ALLOCATORS, Allocator, Table
from prunus.core.names import Registry, did_you_mean
from prunus.core.numbers import is_finite, shortened
from prunus.modifiers import MODIFIERS, Modifier
from prunus.modifiers.nm.maskings import MASKINGS, Masking
from prunus.modifiers.timing import Interval
from prunus.pruners import PRUNERS, Pruner
from prunus.recipe.errors import Path, Source

if TYPE_CHECKING:  # it takes a fifth of a second, which only recipes need
    import pydantic

REGISTRIES: dict[Any, Registry[Any]] = {
    Pruner: PRUNERS,
    Allocator: ALLOCATORS,
    Masking: MASKINGS,
    Modifier: MODIFIERS,
}


def key_of(field: str) -> str:
    """The recipe's word for a field: ``from_`` is written ``from``."""
    return field.rstrip("_")


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """Field name -> type, in the order of declaration."""
    known = typing.get_type_hints(cls)
    return {field.name: known[field.name] for field in dataclasses.fields(cls)}


def members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union; a lone type is its own."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


@functools.cache
def adapter(cls: type) -> pydantic.TypeAdapter[Any]:
    """The checker of one dataclass."""
    import pydantic

    for part in [cls, *(m for hint in hints(cls).values() for m in members(hint))]:
        if dataclasses.is_dataclass(part) and "__pydantic_config__" not in vars(part):
            config = {"use_attribute_docstrings": True, "arbitrary_types_allowed": True}
            setattr(part, "__pydantic_config__", config)  # noqa: B010
    return pydantic.TypeAdapter(cls)


def build(cls: type, data: Any, source: Source, path: Path) -> Any:
    """An instance of the dataclass from a mapping.

    Raises RecipeError naming file, line and path for unknown keys and values that do not fit.
    """
    if not isinstance(data, Mapping):
        raise source.error(path, f"expected a mapping with keys {', '.join(_keys(cls))}")
    fields = {key_of(name): name for name in hints(cls)}
    values = {}
    for key, value in data.items():
        if key not in fields:
            hint = did_you_mean(key, fields)
            raise source.error((*path, key), f"unknown key {key!r}{hint}")
        values[fields[key]] = _value(hints(cls)[fields[key]], value, source, (*path, key))
    import pydantic

    try:
        return adapter(cls).validate_python(values)
    except pydantic.ValidationError as error:
        raise _explain(cls, error, source, path) from None


def _keys(cls: type) -> list[str]:
    return [key_of(name) for name in hints(cls)]


def _value(hint: Any, value: Any, source: Source, path: Path) -> Any:
    if isinstance(value, bool) and bool not in members(hint):
        raise source.error(path, f"{str(value).lower()} is no value for this")
    _check_finite(value, source, path)
    is_mapping = isinstance(value, Mapping)
    for member in members(hint):
        if member is Allocator and isinstance(value, Mapping) and "name" not in value:
            value = {"name": Table.name, "sparsities": value}
        if member in REGISTRIES:
            return build_named(REGISTRIES[member], value, source, path)
        if isinstance(member, type) and dataclasses.is_dataclass(member) and is_mapping:
            return build(member, value, source, path)
        if typing.get_origin(member) is tuple and isinstance(value, str):
            return (value,)
    return value


def _check_finite(value: Any, source: Source, path: Path) -> None:
    """Raises RecipeError for NaN, infinities and numbers too large for a float."""
    if isinstance(value, int | float) and not is_finite(value):
        raise source.error(path, f"expected a finite number, not {shortened(value)}")
    if isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _check_finite(item, source, (*path, i))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _check_finite(item, source, (*path, key))


def build_named(registry: Registry[Any], data: Any, source: Source, path: Path) -> Any:
    """``cap`` or ``{name: cap, damp: 1e-8}`` to an instance of the registered class."""
    settings = {"name": data} if isinstance(data, str) else data
    if not isinstance(settings, Mapping) or not isinstance(settings.get("name"), str):
        hint = f"expected a name ({', '.join(registry)}) or a mapping with a name"
        raise source.error(path, hint)
    arguments = {key: value for key, value in settings.items() if key != "name"}
    try:
        cls = registry[settings["name"]]
    except ValueError as error:
        raise source.error(path if isinstance(data, str) else (*path, "name"), str(error)) from None
    return build(cls, arguments, source, path)


def _explain(cls: type, error: pydantic.ValidationError, source: Source, path: Path) -> ValueError:
    found = error.errors()
    first = found[0]
    if first["type"] == "value_error":  # raised by the dataclass itself, which says it all
        where = tuple(key_of(str(part)) for part in first["loc"][:1])
        return source.error((*path, *where), str(first["ctx"]["error"]))
    name = str(first["loc"][0]) if first["loc"] else ""
    same = [e for e in found if e["loc"][:1] == first["loc"][:1]]
    depth = max(len(e["loc"]) for e in same)
    wishes = dict.fromkeys(_wish(e["msg"]) for e in same if len(e["loc"]) == depth)
    if first["type"] in ("missing", "missing_argument"):
        return source.error(path, f"{key_of(name)!r} is required")
    hint = ""
    if issubclass(cls, Interval) or name == "cycle":
        hint = "; durations have a unit: '3ep', '500step' or '40%'"
    message = f"expected {' or '.join(wishes)}, not {first['input']!r}{hint}"
    return source.error((*path, key_of(name)), message)


def _wish(message: str) -> str:
    """pydantic's sentence in a recipe writer's words."""
    # of 'a', 'b' or 'c' all, of "a valid integer, unable to parse" the first
    wish = re.split(r",(?! ')", message.removeprefix("Input should be "))[0]
    if "instance of" in wish:
        return "a mapping"
    words = {"a valid string": "text", "a valid tuple": "a list", "a valid integer": "an integer"}
    return words.get(wish, wish.replace("a valid ", "a "))


def dump(value: Any) -> Any:
    """The plain values that build this, defaults left out; the inverse of `build`."""
    if isinstance(value, tuple):
        return [dump(item) for item in value]
    if isinstance(value, Mapping):
        return {key: dump(item) for key, item in value.items()}
    if isinstance(value, numbers.Real) and not isinstance(value, bool):  # numpy's, too
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    result: dict[str, Any] = {}
    registered = any(type(value) in registry.values() for registry in REGISTRIES.values())
    if registered and not isinstance(value, Modifier):
        result["name"] = value.name  # type: ignore[attr-defined]
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if item != _default(field):
            result[key_of(field.name)] = dump(item)
    return result["name"] if list(result) == ["name"] else result


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
