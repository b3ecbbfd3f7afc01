"""What a recipe becomes, and what is no recipe."""

import pytest

from prunus import Magnitude, PruningModifier, Recipe
from prunus.modifiers import Freeze, LearningRate, WeightDecay
from prunus.modifiers.schedules import Schedule
from prunus.modifiers.timing import Interval, Window
from prunus.recipe import RecipeError

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
        Freeze(exclude=("head.*",), window=Interval(to="10%")),
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
    "a masking": ("- nm_training: {masking: soft}", "unknown masking 'soft'"),
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
    "every": (
        "- learning_rate: {to: 1, window: {every: 1ep}}",
        "window.every: unknown key 'every'",
    ),
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


def test_a_missing_file_suggests_its_neighbour(tmp_path):
    (tmp_path / "magnitude-90.yaml").write_text(FULL)
    with pytest.raises(FileNotFoundError, match=r"did you mean '.*magnitude-90.yaml'"):
        Recipe.load(tmp_path / "magnitude-9.yaml")


def test_a_file_that_is_no_text_is_refused_by_name(tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes("# é\nmodifiers: []\n".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"latin\.yaml: not UTF-8 text"):
        Recipe.load(path)


def test_a_recipe_of_one_line_is_text_and_no_path():
    recipe = Recipe.load("modifiers: [{prune: {sparsity: 0.5}}]")
    assert recipe.modifiers == (PruningModifier(sparsity=0.5),)


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
