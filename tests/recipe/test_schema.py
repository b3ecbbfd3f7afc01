"""The JSON schema takes what recipes may say, and refuses the rest."""

import json

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus import Magnitude, PruningModifier, Recipe
from prunus.allocators import ERK, Table, Uniform
from prunus.modifiers import Freeze, LearningRate
from prunus.modifiers.schedules import Schedule
from prunus.modifiers.timing import Interval, Window
from prunus.recipe import RecipeError, json_schema

SCHEMA = jsonschema.Draft202012Validator(json_schema())

NUMBERS = st.floats(0, 1, allow_nan=False)

SCHEDULES = st.one_of(
    NUMBERS,
    st.builds(
        lambda ends, curve: Schedule(min(ends), max(ends), curve),
        st.tuples(NUMBERS, NUMBERS),
        st.sampled_from(["linear", "cubic", "cosine"]),
    ),
    st.builds(
        lambda values: Schedule(values=tuple(sorted(values))),
        st.lists(NUMBERS, min_size=1, max_size=4),
    ),
)

WINDOWS = st.builds(
    Window,
    st.sampled_from(["0ep", "7step", "10%"]),
    st.sampled_from([None, "16ep", "100%"]),
    st.sampled_from([None, "2ep"]),
)
INTERVALS = st.builds(
    Interval, st.sampled_from(["0ep", "7step", "10%"]), st.sampled_from([None, "16ep", "100%"])
)


@st.composite
def pruning_modifiers(draw):
    sparsity = draw(SCHEDULES)
    begins = st.sampled_from([None, Window(), Window("7step")])
    return PruningModifier(
        Magnitude(),
        sparsity,
        draw(st.one_of(st.none(), st.just(("a.*", "re:b|c")))),
        draw(st.sampled_from([(), ("d",)])),
        draw(st.sampled_from(["unstructured", "row", "4x1"])),
        draw(st.sampled_from([None, ERK(), Uniform(), Table({"*": 0.5})])),
        draw(begins if isinstance(sparsity, float) else st.one_of(st.none(), WINDOWS)),
    )


MODIFIERS = st.one_of(
    pruning_modifiers(),
    st.builds(
        LearningRate, NUMBERS, NUMBERS, st.just("linear"), groups=st.sampled_from([None, (0,)])
    ),
    st.builds(Freeze, st.just(("*",)), st.just(("head.*",)), st.one_of(st.none(), INTERVALS)),
)


@given(st.lists(MODIFIERS, min_size=1, max_size=4).map(tuple))
@settings(deadline=None, max_examples=60)
def test_yaml_gives_the_same_recipe_back_and_fits_the_schema(modifiers):
    recipe = Recipe(modifiers)
    text = recipe.to_yaml()
    assert Recipe.from_yaml(text) == recipe
    SCHEMA.validate(json.loads(json.dumps(yaml.safe_load(text))))


@pytest.mark.parametrize(
    "bad",
    [
        {"modifiers": [{"prune": {"sparsty": 0.5}}]},
        {"modifiers": [{"prun": {}}]},
        {"modifiers": [{"prune": {"pruner": "magnitud"}}]},
        {"modifiers": []},
        {"modifier": []},
        {"modifiers": [{"learning_rate": {"to": "fast"}}]},
    ],
)
def test_the_schema_refuses_what_the_recipe_refuses(bad):
    with pytest.raises(jsonschema.ValidationError):
        SCHEMA.validate(bad)
    with pytest.raises(RecipeError):
        Recipe.from_yaml(yaml.safe_dump(bad))


@pytest.mark.parametrize(
    "entry",
    [
        'prune: {sparsity: "${s}", pruner: "${p}"}',
        'prune: {sparsity: {from: 0.1, to: "${s}"}, window: {to: "${s}ep"}}',
        'prune: {sparsity: {values: [0.1, "${s}"]}, layers: ["${p}"]}',
        'prune: {allocator: {"blocks.*": 0.5, "*": "${s}"}}',
        'learning_rate: {to: "${s}", groups: [0]}',
    ],
)
def test_the_schema_takes_what_the_recipe_takes(entry):
    text = f"variables: {{s: 0.75, p: magnitude}}\nmodifiers:\n  - {entry}\n"
    Recipe.from_yaml(text)
    SCHEMA.validate(yaml.safe_load(text))


def test_the_schema_is_one_itself():
    jsonschema.Draft202012Validator.check_schema(json_schema())
