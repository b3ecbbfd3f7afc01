"""The state of a session, read and checked before anything is changed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from prunus.core.masks import unpack
from prunus.recipe import Recipe


def checked_masks(
    state: Mapping[str, Any], recipe: Recipe, parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The masks of a state, whole, by parameter name.

    Raises ValueError if it is no state, or one of another version, recipe or model.
    """
    if missing := {"version", "recipe", "step", "masks", "runs"} - set(state):
        raise ValueError(f"this is not the state of a session: it lacks {sorted(missing)}")
    if state["version"] != 1:
        raise ValueError(f"the state has version {state['version']}; this prunus reads 1")
    text = recipe.to_yaml()
    if _in_words_of_today(state["recipe"]) != text:
        raise ValueError(
            "the state is of another recipe; resume with the recipe it was trained with.\n"
            f"--- the state's\n{state['recipe']}--- this session's\n{text}"
        )
    masks = {}
    for name, bits in state["masks"].items():
        shape = tuple(bits["shape"])
        if name not in parameters or tuple(parameters[name].shape) != shape:
            raise ValueError(f"the state masks {name!r} of shape {shape}; this model has none")
        masks[name] = unpack(bits["bits"], shape)
    return masks


def _in_words_of_today(recipe: str) -> str:
    """The text of a state's recipe, whichever version wrote it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return Recipe.load(recipe).to_yaml()
