"""Recipes: YAML to modifiers and back."""

from prunus.recipe.errors import RecipeError
from prunus.recipe.native import Recipe
from prunus.recipe.schema import json_schema

__all__ = ["Recipe", "RecipeError", "json_schema"]
