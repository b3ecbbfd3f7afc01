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
    given = settings.any("mask_type", "unstructured")
    if given == "unstructured":
        return Unstructured()
    if given in ("block4", "block"):  # as it is called since, and as it was
        return Block(1, 4)
    try:
        if isinstance(given, list) and all(type(i) is int for i in given) and len(given) == 2:
            return Block(*given)
        if (ratio := _ratio(settings, given)) is not None:
            n, m = ratio
            return NM(m - n if situation.dialect == CAP and given != "tensorrt" else n, m)
    except ValueError as error:
        raise settings.error(str(error), "mask_type") from None
    known = "unstructured, block4, [1, 4] or 2:4"
    if given in ("filter", "channel"):
        said = f"prunus removes no whole filters or channels (mask_type {given!r}); use {known}"
        raise settings.error(said, "mask_type")
    raise settings.error(f"unknown mask_type {given!r}; use {known}", "mask_type")


def _ratio(settings: Settings, given: Any) -> tuple[int, int] | None:
    """N and M of ``2:4``, of the number 124 that YAML 1.1 makes of it, and of ``n`` and ``m``."""
    if type(given) is int:  # base 60
        return divmod(given, 60)
    if given == "tensorrt":
        return 2, 4
    if given == "N:M":
        return settings.integer("n"), settings.integer("m")
    match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", given) if isinstance(given, str) else None
    return None if match is None else (int(match[1]), int(match[2]))
