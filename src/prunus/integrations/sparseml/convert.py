"""Old recipes as text of our own kind, for `prunus convert`."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping
from typing import Any

from prunus.recipe import Recipe
from prunus.recipe.files import parse, text_of
from prunus.recipe.sparseml import is_sparseml, read

TITLES = {"sparseml": "SparseML", "cap": "CAP"}


def convert(
    recipe: str | os.PathLike[str],
    dialect: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> str:
    """YAML of the same recipe; comments say what has no counterpart or means something else.

    Raises ValueError for a recipe that is not SparseML's or CAP's, RecipeError for what is wrong in
    it and where nothing is left of it.
    """
    text, name = text_of(recipe)
    data, source = parse(text, name)
    if dialect is None and not is_sparseml(data):
        raise ValueError(
            f"{name}: no modifiers with tags, so it is no recipe of SparseML's or CAP's"
        )
    reading = read(data, source, dialect, False, overrides)
    if not reading.modifiers and reading.epochs is None:
        raise source.error((), "none of its modifiers has a counterpart; nothing is left")
    message = [f"from {name}, read as {TITLES[reading.dialect]}'s"]
    for note in reading.notes:
        line = source.line(note.path) if note.path else None
        message.append(f"line {line}: {note.text}" if line else note.text)
    return _comment(message) + Recipe(reading.modifiers, reading.epochs).to_yaml()


def _comment(paragraphs: list[str]) -> str:
    lines = []
    for paragraph in paragraphs:
        lines += textwrap.wrap(
            paragraph, 98, initial_indent="# ", subsequent_indent="#   ", break_long_words=False
        )
    return "\n".join(lines) + "\n"
