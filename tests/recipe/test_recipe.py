import json
import time

import jsonschema
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus import Magnitude, PruningModifier, Recipe
from prunus.allocators import ERK, Table, Uniform
from prunus.modifiers import Freeze, LearningRate, WeightDecay
from prunus.modifiers.schedules import Schedule
from prunus.modifiers.timing import Window
from prunus.recipe import RecipeError, json_schema

FULL = """\
# gradual, with everything
variables: {sparsity: 0.75, epochs: 16}
modifiers:
  - prune:
      pruner: {name: magnitude}
      layers: ["blocks.*.attn.qkv", "blocks.*.mlp.fc*"]
      allocator: global
      sparsity: {from: 0.30, to: "${sparsity}", curve: cubic}
      window: {from: 0ep, to: "${epochs}ep", every: 2ep}
  - prune: {pattern: 2:4, exclude: [head]}
  - learning_rate: {curve: cosine, from: 5e-4, to: 1e-7, cycle: 5ep}
  - weight_decay: {to: 0}
  - freeze: {exclude: ["head.*"], window: {to: 10%}}
"""


def test_a_recipe_becomes_frozen_modifiers():
    from prunus.allocators import Global

    recipe = Recipe.load(FULL)
    assert recipe.modifiers == (
        PruningModifier(
            Magnitude(),
            Schedule(0.3, 0.75, "cubic"),
            ("blocks.*.attn.qkv", "blocks.*.mlp.fc*"),
            allocator=Global(),
            window=Window("0ep", "16ep", "2ep"),
        ),
        PruningModifier(pattern="2:4", exclude=("head",)),
        LearningRate(5e-4, 1e-7, "cosine", cycle="5ep"),
        WeightDecay(to=0.0),
        Freeze(exclude=("head.*",), window=Window(to="10%")),
    )


def test_overrides_replace_variables():
    recipe = Recipe.load(FULL, sparsity=0.8, epochs=4)
    assert recipe.modifiers[0].sparsity.to == 0.8
    assert recipe.modifiers[0].window.to == "4ep"


def test_an_unknown_override_is_an_error():
    with pytest.raises(RecipeError, match=r"unknown variable 'sparsty'; did you mean 'sparsity'\?"):
        Recipe.load(FULL, sparsty=0.8)
    with pytest.raises(RecipeError, match="the recipe declares no variables"):
        Recipe.load("modifiers:\n  - prune: {sparsity: 0.5}\n", sparsity=0.8)


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
    st.builds(Freeze, st.just(("*",)), st.just(("head.*",)), st.one_of(st.none(), WINDOWS)),
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


ERRORS = {
    "a modifier": (
        "- prun: {}",
        "modifiers[0].prun: unknown modifier 'prun'; did you mean 'prune'?",
    ),
    "a key": (
        "- prune: {sparsty: 1}",
        "modifiers[0].prune.sparsty: unknown key 'sparsty'; did you mean 'sparsity'?",
    ),
    "a pruner": (
        "- prune: {pruner: magnitud}",
        "modifiers[0].prune.pruner: unknown pruner 'magnitud'; did you mean 'magnitude'?",
    ),
    "a pruner's key": (
        "- prune: {pruner: {name: magnitude, damp: 1}}",
        "modifiers[0].prune.pruner.damp: unknown key 'damp'",
    ),
    "an allocator": (
        "- prune: {allocator: gobal}",
        "unknown allocator 'gobal'; did you mean 'global'",
    ),
    "a masking": ("- prune: {masking: soft}", "unknown masking 'soft'"),
    "a pattern": (
        "- prune: {pattern: unstructred, sparsity: 0.5}",
        "unknown pattern 'unstructred'",
    ),
    "a curve": (
        "- prune: {sparsity: {from: 0, to: 1, curve: cubik}}",
        "modifiers[0].prune.sparsity: unknown curve 'cubik'; did you mean 'cubic'?",
    ),
    "a unit": (
        "- prune: {sparsity: 0.5, window: {from: 3epp}}",
        "modifiers[0].prune.window: '3epp' is not a duration; write '3ep', '500step' or '40%'",
    ),
    "no unit": (
        "- prune: {sparsity: 0.5, window: {from: 3}}",
        "modifiers[0].prune.window.from: expected text, not 3; durations have a unit",
    ),
    "a number": (
        "- prune: {sparsity: lots}",
        "modifiers[0].prune.sparsity: expected a number or a mapping, not 'lots'",
    ),
    "a truth": ("- prune: {sparsity: true}", "modifiers[0].prune.sparsity: true is no value"),
    "a range": (
        "- prune: {sparsity: 75}",
        "modifiers[0].prune: sparsity 75.0 is not between 0 and 1",
    ),
    "a fall": (
        "- prune: {sparsity: {from: 0.9, to: 0.5}}",
        "modifiers[0].prune: sparsity falls to 0.5, but pruned weights do not come back",
    ),
    "a cycle of nothing": (
        "- learning_rate: {from: 1, to: 0, cycle: 0ep}",
        "cycle='0ep' never moves on",
    ),
    "a cycle of a constant": (
        "- learning_rate: {to: 1, cycle: 1ep}",
        "'cycle' means nothing to curve 'constant'",
    ),
    "no sparsity": ("- prune: {pruner: magnitude}", "no sparsity was given"),
    "N:M and sparsity": (
        "- prune: {pattern: 2:4, sparsity: 0.7}",
        "drop 'sparsity', or write that",
    ),
    "N:M and allocator": ("- prune: {pattern: 2:4, allocator: erk}", "drop 'allocator'"),
    "a list": ("prune: {}", "modifiers: expected a list of modifiers"),
    "two in one": ("- {prune: {sparsity: 1}, freeze: {}}", "modifiers[0]: expected one modifier"),
    "every": ("- learning_rate: {to: 1, window: {every: 1ep}}", "'every' means nothing here"),
    "zero every": ("- prune: {sparsity: 1, window: {every: 0ep}}", "never moves on"),
    "a constant over a window": (
        "- prune: {sparsity: 0.5, window: {from: 1ep, to: 5ep}}",
        "modifiers[0].prune: a constant sparsity is pruned at once",
    ),
}


@pytest.mark.parametrize(("entry", "message"), ERRORS.values(), ids=ERRORS)
def test_every_mistake_names_file_line_path_and_remedy(entry, message, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(f"# a comment\nmodifiers:\n  {entry}\n")
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path)
    assert str(caught.value).startswith(f"{path}:")
    line = int(str(caught.value).removeprefix(f"{path}:").split(":")[0])
    assert line in (2, 3)
    assert message in str(caught.value)


def test_the_line_is_that_of_the_value():
    with pytest.raises(RecipeError, match=r"^recipe:9: modifiers\[0\].prune.window.evry: "):
        Recipe.load(FULL.replace("every", "evry"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-7", 1e-7),
        ("1E-7", 1e-7),
        ("+.5", 0.5),
        ("1_0", "1_0"),
        ("2:4", "2:4"),
        ("1:30:5", "1:30:5"),
        ("on", "on"),
        ("no", "no"),
        ("true", True),
        ("010", 10),
        ("0o10", "0o10"),
        ("~", None),
        ("2024-01-01", "2024-01-01"),
        (".inf", float("inf")),
        ("-3", -3),
        ("", None),
    ],
)
def test_scalars_mean_what_they_look_like(text, expected):
    from prunus.recipe.yaml import read_yaml

    value, _ = read_yaml(f"x: {text}\n", "t")
    assert value == {"x": expected}
    assert type(value["x"]) is type(expected)


def test_anchors_and_merges_are_understood():
    recipe = Recipe.load("""
modifiers:
  - prune: &first {sparsity: 0.5, layers: [a]}
  - prune: {<<: *first, sparsity: 0.9}
""")
    assert recipe.modifiers[1] == PruningModifier(sparsity=0.9, layers=("a",))


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(12)
)
HOSTILE = {
    "10,000 lines": "modifiers:\n" + "  - prune: {sparsity: 0.5}\n" * 10_000,
    "anchors within anchors": BOMB,
    "deep brackets": "modifiers: " + "[" * 5_000 + "]" * 5_000,
    "deep mappings": "".join("  " * i + "a:\n" for i in range(400)),
    "a circle": "modifiers: &a [*a]\n",
    "not YAML": "modifiers: [",
    "a tab": "modifiers:\n\t- prune: {}",
    "two documents": "a: 1\n---\nb: 2\n",
    "a tag": "modifiers: !!python/object/apply:os.system ['true']\n",
    "empty": "\n",
    "twice": "modifiers: []\nmodifiers: []\n",
    "an unknown anchor": "modifiers: *nowhere\n",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_texts_are_refused_with_one_clear_error(text):
    with pytest.raises(RecipeError, match=r"^recipe"):
        Recipe.from_yaml(text)


def test_a_bomb_of_anchors_is_refused_before_it_is_built():
    begin = time.process_time()
    with pytest.raises(RecipeError, match="nested too deeply"):
        Recipe.from_yaml(BOMB)
    assert time.process_time() - begin < 30  # built in full it has 9^13 entries


def test_a_missing_file_suggests_its_neighbour(tmp_path):
    (tmp_path / "magnitude-90.yaml").write_text(FULL)
    with pytest.raises(FileNotFoundError, match=r"did you mean '.*magnitude-90.yaml'"):
        Recipe.load(tmp_path / "magnitude-9.yaml")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("9" * 5_000, "cannot be read as int"),
        ("!!int abc", "'abc' cannot be read as int"),
        ("!!bool maybe", "'maybe' cannot be read as bool"),
        ("!!timestamp noon", "'noon' cannot be read as timestamp"),
        ("0.5\x07", "special characters are not allowed"),
    ],
)
def test_scalars_that_cannot_be_read_are_refused_with_their_line(value, message):
    with pytest.raises(RecipeError, match=rf"^recipe:2: .*{message}"):
        Recipe.from_yaml(f"modifiers:\n  - prune: {{sparsity: {value}}}\n")


def test_a_file_that_is_no_text_is_refused_by_name(tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes("# é\nmodifiers: []\n".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"latin\.yaml: not UTF-8 text"):
        Recipe.load(path)


def test_a_recipe_of_one_line_is_text_and_no_path():
    recipe = Recipe.load("modifiers: [{prune: {sparsity: 0.5}}]")
    assert recipe.modifiers == (PruningModifier(sparsity=0.5),)


def test_numbers_of_numpy_travel_in_a_recipe():
    recipe = Recipe((PruningModifier(sparsity=np.float32(0.5)), LearningRate(to=np.float64(1e-7))))
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


@pytest.mark.parametrize("name", ["recipe", "text", "name"])
def test_a_variable_may_have_any_name(name):
    text = f'variables: {{{name}: 0.5}}\nmodifiers:\n  - prune: {{sparsity: "${{{name}}}"}}\n'
    assert Recipe.load(text, **{name: 0.75}).modifiers[0].sparsity == 0.75


def test_a_variable_that_refers_to_another_is_an_error():
    with pytest.raises(RecipeError, match=r"^recipe:1: variables\.s: variables cannot refer to"):
        Recipe.from_yaml('variables: {a: 0.5, s: "${a}"}\nmodifiers:\n  - prune: {sparsity: 1}\n')


def test_an_unknown_variable_in_the_text_is_an_error():
    with pytest.raises(
        RecipeError,
        match=r"recipe:4: modifiers\[0\].prune.sparsity: unknown "
        r"variable 'sparsty'; did you mean 'sparsity'",
    ):
        Recipe.load(
            "variables: {sparsity: 0.5}\nmodifiers:\n  - prune:\n      sparsity: ${sparsty}\n"
        )
