"""Recipes: YAML to modifiers and back."""

from prunus.recipe.build import json_schema
from prunus.recipe.errors import RecipeError
from prunus.recipe.native import Recipe

__all__ = ["Recipe", "RecipeError", "json_schema"]
