"""SparseML's ways to give values for a recipe's variables."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from prunus.recipe.sparseml.settings import as_number


def parse_variables(value: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """A mapping, JSON of one, or ``name=value,name=value`` (``name: value`` too) as a mapping.

    Raises ValueError for any other text.
    """
    if not value:
        return {}
    if isinstance(value, Mapping):
        return dict(value)
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError:
        return dict(_pair(part, value) for part in value.split(","))
    if not isinstance(parsed, dict):
        raise ValueError(f"recipe_variables={value!r} is no mapping of names to values")
    return parsed


def _pair(part: str, value: str) -> tuple[str, Any]:
    name, *values = part.replace(":", "=", 1).split("=") if "=" not in part else part.split("=")
    if len(values) != 1 or not name.strip():
        raise ValueError(f"recipe_variables={value!r}: {part!r} must be written name=value")
    text = values[0].strip()
    number = as_number(text)
    return name.strip(), text if number is None else number
