"""``mask_type``: what SparseML and CAP call the shape of a mask."""

from __future__ import annotations

import re
from typing import Any

from prunus.core.patterns import NM, Block, Pattern, Unstructured
from prunus.recipe.sparseml.parts import CAP, Situation
from prunus.recipe.sparseml.settings import Settings


def pattern_of(settings: Settings, situation: Situation) -> Pattern:
    """The pattern. The N of N:M is what stays in SparseML, and what goes in CAP.

    Raises RecipeError for structured masks and unknown ones.
    """
    value = settings.any("mask_type", "unstructured")
    if value == "unstructured":
        return Unstructured()
    if value in ("block4", "block"):  # as it is called since, and as it was
        return Block(1, 4)
    try:
        if isinstance(value, list) and all(type(i) is int for i in value) and len(value) == 2:
            return Block(*value)
        if (ratio := _ratio(settings, value)) is not None:
            n, m = ratio
            return NM(m - n if situation.dialect == CAP and value != "tensorrt" else n, m)
    except ValueError as error:
        raise settings.error(str(error), "mask_type") from None
    known = "unstructured, block4, [1, 4] or 2:4"
    if value in ("filter", "channel"):
        message = f"prunus removes no whole filters or channels (mask_type {value!r}); use {known}"
        raise settings.error(message, "mask_type")
    raise settings.error(f"unknown mask_type {value!r}; use {known}", "mask_type")


def _ratio(settings: Settings, value: Any) -> tuple[int, int] | None:
    """N and M of ``2:4``, of the number 124 that YAML 1.1 makes of it, and of ``n`` and ``m``."""
    if type(value) is int:  # base 60
        return divmod(value, 60)
    if value == "tensorrt":
        return 2, 4
    if value == "N:M":
        return settings.integer("n"), settings.integer("m")
    match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", value) if isinstance(value, str) else None
    return None if match is None else (int(match[1]), int(match[2]))
