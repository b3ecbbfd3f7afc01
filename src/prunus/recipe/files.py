"""Where the text of a recipe comes from."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

from prunus.recipe.errors import RecipeError, Source
from prunus.recipe.sparseml import front_matter
from prunus.recipe.yaml import read_yaml

ENDINGS = (".yaml", ".yml", ".md")


def is_text(recipe: str) -> bool:
    """Whether this is the text of a recipe, not the path of one."""
    return "\n" in recipe or "modifiers:" in recipe or recipe.lstrip().startswith(("!", "- !"))


def text_of(recipe: str | os.PathLike[str]) -> tuple[str, str]:
    """The text of a recipe and what to call it in errors.

    Raises FileNotFoundError with near names for a missing file, and RecipeError for one that is no
    text.
    """
    if isinstance(recipe, str) and is_text(recipe):
        return recipe, "recipe"
    path = Path(recipe)
    if not path.is_file():
        beside = [p.name for e in ENDINGS for p in path.parent.glob("*" + e)]
        near = difflib.get_close_matches(path.name, beside, n=1)
        hint = f"; did you mean '{path.parent / near[0]}'?" if near else ""
        raise FileNotFoundError(f"no recipe file '{path}'{hint}")
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text: {error.reason}") from None


def parse(text: str, name: str) -> tuple[Any, Source]:
    """The values of a recipe's YAML, which may be the front matter of Markdown."""
    return read_yaml(front_matter(text, name, name.lower().endswith(".md")), name)
