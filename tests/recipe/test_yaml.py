"""What scalars, anchors and hostile texts are read as."""

import time

import numpy as np
import pytest

from prunus import PruningModifier, Recipe
from prunus.modifiers import LearningRate
from prunus.recipe import RecipeError

from tests.recipe.test_recipe import FULL


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


def test_numbers_of_numpy_travel_in_a_recipe():
    recipe = Recipe((PruningModifier(sparsity=np.float32(0.5)), LearningRate(to=np.float64(1e-7))))
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
