"""The JSON schema of a recipe, for editors and for the tables of settings."""

from __future__ import annotations

import dataclasses
import functools
import typing
from typing import Any

from prunus.allocators import Allocator, Table
from prunus.modifiers import MODIFIERS, Modifier
from prunus.recipe.build import REGISTRIES, adapter, key_of

_NAMED = "named by a registry"


@functools.cache
def _generator() -> type[Any]:
    """A generator for which protocols are references to the named things a recipe may write."""
    from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

    class Schema(GenerateJsonSchema):
        def is_instance_schema(self, schema: Any) -> JsonSchemaValue:
            return {_NAMED: schema["cls"].__name__}

    return Schema


def class_schema(cls: type) -> dict[str, Any]:
    """JSON schema of one dataclass, in the recipe's words."""
    schema = adapter(cls).json_schema(
        schema_generator=_generator(), ref_template="#/$defs/{model}", mode="validation"
    )
    result = typing.cast("dict[str, Any]", _in_words(schema))
    for base in cls.__mro__[1:]:  # pydantic reads docstrings from a class's own body only
        if dataclasses.is_dataclass(base):
            for key, inherited in class_schema(base).get("properties", {}).items():
                for word in inherited.keys() - result["properties"][key].keys():
                    result["properties"][key][word] = inherited[word]
    return result


def _in_words(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_in_words(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if _NAMED in schema:
        rest = {key: value for key, value in schema.items() if key not in (_NAMED, "default")}
        return {**rest, "$ref": f"#/$defs/{schema[_NAMED]}"}
    result = {key: _in_words(value) for key, value in schema.items() if key != "default"}
    if "properties" in result:
        result["properties"] = {key_of(k): v for k, v in result["properties"].items()}
        result["additionalProperties"] = False
    if result.get("type") == "array" and result.get("items") == {"type": "string"}:
        message = {key: result.pop(key) for key in ("description", "title") if key in result}
        return {"anyOf": [result, {"type": "string"}], **message}
    return result


def _or_variable(schema: Any) -> Any:
    """The schema, in which ``"${name}"`` may stand for any value but a name."""
    if isinstance(schema, list):
        return [_or_variable(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: _or_variable(value) for key, value in schema.items()}
    slots = [(result, key) for key in ("items", "additionalProperties")]
    slots += [(result["properties"], key) for key in result.get("properties", {})]
    for holder, key in slots:
        value = holder.get(key)
        if isinstance(value, dict) and "const" not in value:
            message = {word: value.pop(word) for word in ("title", "description") if word in value}
            holder[key] = {"anyOf": [value, {"$ref": "#/$defs/Variable"}], **message}
    return result


def json_schema() -> dict[str, Any]:
    """JSON schema of a whole recipe, for editors."""
    defs: dict[str, Any] = {}

    def define(cls: type) -> dict[str, Any]:
        schema = class_schema(cls)
        defs.update(schema.pop("$defs", {}))
        return schema

    for protocol, registry in REGISTRIES.items():
        if protocol is Modifier:
            continue
        forms: list[Any] = [{"type": "string", "enum": list(registry)}]
        for name in registry:
            form = define(registry[name])
            form["properties"] = {"name": {"const": name}, **form.get("properties", {})}
            forms.append({**form, "required": ["name", *form.get("required", [])]})
        if protocol is Allocator:  # a table may be written without its name
            table = define(Table)["properties"]["sparsities"]
            forms.append({**table, "not": {"required": ["name"]}})
        defs[protocol.__name__] = {"anyOf": forms}
    entries = {name: _or_variable(define(MODIFIERS[name])) for name in MODIFIERS}
    defs = {name: _or_variable(form) for name, form in defs.items()}
    defs["Variable"] = {"type": "string", "pattern": r"\$\{.*\}"}
    entry = {
        "type": "object",
        "properties": entries,
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "prunus recipe",
        "type": "object",
        "properties": {
            "epochs": {
                "anyOf": [
                    {"type": "number", "exclusiveMinimum": 0},
                    {"$ref": "#/$defs/Variable"},
                ],
                "description": "length of training, unless attach is told another",
            },
            "variables": {"type": "object"},
            "modifiers": {"type": "array", "items": entry, "minItems": 1},
        },
        "anyOf": [{"required": ["modifiers"]}, {"required": ["epochs"]}],
        "additionalProperties": False,
        "$defs": defs,
    }
