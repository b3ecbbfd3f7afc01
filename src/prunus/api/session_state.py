"""The state of a session, read and checked before anything is changed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from prunus.core.fused_qkv import qkv_parts
from prunus.core.masks import check_packed, unpack
from prunus.modifiers import Run
from prunus.recipe import Recipe


class State(BaseModel):
    """What `Session.state_dict` returns."""

    model_config = ConfigDict(strict=True)

    version: Literal[1]
    recipe: str
    step: Annotated[int, Field(ge=0)]
    masks: dict[str, dict[str, Any]]
    runs: list[dict[str, Any]]


def checked_state(
    state: Any, recipe: Recipe, parameters: Mapping[str, Tensor], runs: Sequence[Run]
) -> tuple[State, dict[str, Tensor]]:
    """The state, and the masks in it, whole, by parameter name.

    Raises ValueError, naming the key, if it is no state, or one of another version, recipe or
    model.
    """
    read = _read(state)
    text = recipe.to_yaml()
    if _in_words_of_today(read.recipe) != text:
        raise ValueError(
            "the state is of another recipe; resume with the recipe it was trained with.\n"
            f"--- the state's\n{read.recipe}--- this session's\n{text}"
        )
    masks = {}
    for name, bits in read.masks.items():
        shape = check_packed(f"the state's masks[{name!r}]", bits)
        if name not in parameters or tuple(parameters[name].shape) != shape:
            raise ValueError(f"the state masks {name!r} of shape {shape}; this model has none")
        masks[name] = unpack(bits["bits"], shape)
    _check_runs(read.runs, runs, masks)
    return read, masks


def _read(state: Any) -> State:
    if not isinstance(state, Mapping):
        raise ValueError(f"this is not the state of a session: {type(state).__name__}")
    if missing := State.model_fields.keys() - state.keys():
        raise ValueError(f"this is not the state of a session: it lacks {sorted(missing)}")
    if state["version"] != 1:
        raise ValueError(f"the state has version {state['version']}; this prunus reads 1")
    try:
        return State.model_validate(dict(state))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ValueError(f"the state's {key}={first['input']!r}: {first['msg']}") from None


def _check_runs(
    states: Sequence[dict[str, Any]], runs: Sequence[Run], masks: Mapping[str, Tensor]
) -> None:
    if len(states) != len(runs):
        raise ValueError(f"the state has {len(states)} runs, the recipe {len(runs)} entries")
    for index, (state, run) in enumerate(zip(states, runs, strict=True)):
        try:
            run.check_state(state)
            _check_owned(state.get("owned", ()), run, masks)
        except ValueError as error:
            raise ValueError(f"the state's runs[{index}]: {error}") from None


def _check_owned(owned: Sequence[str], run: Run, masks: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless all that the run owned is of its layers, and masked."""
    layers = {x.name: x for layer in run.masked_layers for x in (layer, *qkv_parts(layer))}
    for name in owned:
        if name not in layers:
            raise ValueError(f"owned has {name!r}, which is no layer of this entry")
        if layers[name].parameter_name not in masks:
            raise ValueError(f"owned has {name!r}, for which the state has no mask")


def _in_words_of_today(recipe: str) -> str:
    """The text of a state's recipe, whichever version wrote it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return Recipe.load(recipe).to_yaml()
