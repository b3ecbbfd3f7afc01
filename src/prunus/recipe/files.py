"""Where the text of a recipe comes from."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

from prunus.core.names import did_you_mean
from prunus.recipe.errors import RecipeError, Source
from prunus.recipe.sparseml import front_matter
from prunus.recipe.yaml import read_yaml

ENDINGS = (".yaml", ".yml", ".md")


def shipped_recipes() -> dict[str, Path]:
    """Recipes that come with the package, by name: ``vit/magnitude-90``."""
    package = Path(__file__).parents[1]
    # in a wheel they lie in the package, in a checkout beside src
    folder = next((f for f in (package / "recipes", *_checkout(package)) if f.is_dir()), None)
    found = sorted(folder.glob("*/*.yaml")) if folder else []
    return {f"{path.parent.name}/{path.stem}": path for path in found}


def _checkout(package: Path) -> list[Path]:
    root = package.parents[1]
    return [root / "recipes"] if (root / "pyproject.toml").is_file() else []


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
    if not path.is_file() and (shipped := shipped_recipes().get(str(recipe))):
        return shipped.read_text(encoding="utf-8"), str(recipe)
    if not path.is_file():
        beside = [p.name for e in ENDINGS for p in path.parent.glob("*" + e)]
        near = difflib.get_close_matches(path.name, beside, n=1)
        hint = f"; did you mean '{path.parent / near[0]}'?" if near else ""
        hint = hint or did_you_mean(str(recipe), shipped_recipes())
        raise FileNotFoundError(f"no recipe file '{path}', nor a shipped recipe{hint}")
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text: {error.reason}") from None


def parse(text: str, name: str) -> tuple[Any, Source]:
    """The values of a recipe's YAML, which may be the front matter of Markdown."""
    return read_yaml(front_matter(text, name, name.lower().endswith(".md")), name)
