"""Names of layers as pictures show them: short, and several as one."""

from __future__ import annotations

import re
from collections.abc import Iterable


def short(name: str) -> str:
    return name if len(name) <= 34 else f"…{name[-33:]}"


def kinds(names: Iterable[str]) -> str:
    """A few words for some layers: ``blocks.*.mlp.fc1, +1``."""
    first, *more = dict.fromkeys(without_indices(name) for name in names)
    return f"{short(first)}, +{len(more)}" if more else short(first)


def without_indices(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def without_digits(name: str) -> str:
    return re.sub(r"\d+", "*", name)
