"""What SparseML's files may look like: YAML, variables, parameters, types."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prunus import OBS, Magnitude, PruningModifier, Recipe
from prunus.modifiers import Keep, LearningRate
from prunus.modifiers.schedules import Schedule
from prunus.modifiers.timing import Window
from prunus.recipe import RecipeError
from prunus.recipe.errors import Source
from prunus.recipe.sparseml.equations import Variables, equation

ENTRY = """\
- !GMPruningModifier
  init_sparsity: 0.1
  final_sparsity: 0.8
  start_epoch: 1
  end_epoch: 5.0
  update_frequency: 0.5
  params: ["re:.*fc.weight"]
"""
EXPECTED = PruningModifier(
    Magnitude(),
    Schedule(0.1, 0.8, "cubic"),
    layers=("re:.*fc.weight.*(?<=weight)",),
    allocator=Recipe.load("modifiers: [prune: {allocator: uniform, sparsity: 1}]")
    .modifiers[0]
    .allocator,
    window=Window("1ep", "5ep", "0.5ep"),
)


def indented(text, by):
    return "".join(" " * by + line + "\n" for line in text.splitlines())


def magnitude(**settings):
    given = {"init_sparsity": 0, "final_sparsity": 0.8, "start_epoch": 0, "end_epoch": 4}
    given |= {"update_frequency": 1, "params": "__ALL_PRUNABLE__", **settings}
    return "!MagnitudePruningModifier {" + ", ".join(f"{k}: {v}" for k, v in given.items()) + "}"


def only(text, **options):
    (modifier,) = Recipe.load(text, **options).modifiers
    return modifier


FORMS = {
    "a list": ENTRY,
    "one modifier": "!GMPruningModifier\n" + indented(ENTRY[22:].replace("\n  ", "\n"), 0).lstrip(),
    "under modifiers": "modifiers:\n" + ENTRY,
    "under any key with modifiers in it": "my_modifiers_of_today:\n" + ENTRY,
    "two keys, one of them empty": "pruning_modifiers:\n" + ENTRY + "training_modifiers:\n",
    "a stage": "first_stage:\n  pruning_modifiers:\n" + indented(ENTRY, 2),
    "with a framework's name": ENTRY.replace("!GM", "!pytorch.GM"),
    "with a colon": ENTRY.replace("Modifier\n", "Modifier:\n"),
    "with version and metadata": "version: 1.1.0\n__metadata__: {a: {b: 1}}\nmodifiers:\n" + ENTRY,
    "Markdown": "---\nmodifiers:\n" + ENTRY + "---\n# A title\n\ntext: more\n",
    "Markdown with plus signs": "+++\nmodifiers:\n" + ENTRY + "+++\nText.\n",
    "Markdown after a comment": "<!--\nsomeone's words\n-->\n\n---\nmodifiers:\n" + ENTRY + "---\n",
}


@pytest.mark.parametrize("text", FORMS.values(), ids=FORMS.keys())
def test_every_form_of_a_file_is_read(text):
    assert only(text) == EXPECTED


@pytest.mark.parametrize("ending", ["yaml", "yml", "md"])
def test_files_are_read_by_their_ending(ending, tmp_path):
    path = tmp_path / f"old.{ending}"
    path.write_text(FORMS["Markdown"])
    assert only(path) == EXPECTED
    assert only(str(path)) == EXPECTED


@pytest.mark.parametrize("second", ["modifiers:\n" + ENTRY, ENTRY, "my_modifiers: []\n"])
def test_a_second_recipe_in_a_file_of_yaml_is_refused(second, tmp_path):
    text = "---\n" + ENTRY + "---\n" + second
    path = tmp_path / "two.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"two\.yaml:9: a second recipe begins here"):
        Recipe.load(path)
    path = tmp_path / "two.md"
    path.write_text(text)
    assert only(path) == EXPECTED


def test_markdown_may_have_text_before_its_recipe(tmp_path):
    path = tmp_path / "card.md"
    path.write_text("# A model\n\n---\nmodifiers:\n" + ENTRY + "---\n")
    assert only(path) == EXPECTED
    path.write_text("# A model without a recipe\n")
    with pytest.raises(RecipeError, match=r"card\.md: no recipe between two lines of '---'"):
        Recipe.load(path)


def test_a_list_of_modifiers_under_another_key_is_refused_with_a_hint():
    with pytest.raises(
        RecipeError,
        match="pruning: a list of modifiers needs 'modifiers' in its name; call it 'pruning_modifiers'",
    ):
        Recipe.load("pruning:\n" + ENTRY)


def test_something_else_among_the_modifiers_is_refused():
    with pytest.raises(RecipeError, match=r"recipe:9: modifiers\[1\]: expected a modifier"):
        Recipe.load("modifiers:\n" + ENTRY + "- {prune: magnitude}\n")
    with pytest.raises(RecipeError, match="unknown tag !Foo"):
        Recipe.load("modifiers:\n- !Foo {}\n")
    with pytest.raises(RecipeError, match="expected a mapping of the settings"):
        Recipe.load("- !GMPruningModifier [1, 2]\n")
    with pytest.raises(RecipeError, match="no modifiers; they stand in lists"):
        Recipe.load("modifiers: []\nnum_epochs: 3\n", dialect="cap")


def test_an_error_names_the_line_in_markdown_too():
    text = "<!-- one\ntwo -->\n---\nmodifiers:\n" + ENTRY.replace("0.8", "much") + "---\n"
    with pytest.raises(
        RecipeError,
        match=r"^recipe:7: modifiers\[0\].final_sparsity: !GMPruningModifier: expected a number, not 'much'",
    ):
        Recipe.load(text)


def test_a_regex_with_an_exclamation_mark_survives():
    text = magnitude(params="['re:(?!head)layer.*', 're:a!GMPruningModifier']")
    expected = ("re:(?!head)layer.*(?<=weight)", "re:a!GMPruningModifier.*(?<=weight)")
    assert only(text).layers == expected


def test_anchors_aliases_and_merges_are_understood():
    text = """
final: &final 0.8
names: &names ['re:.*fc.weight']
base: &base {init_sparsity: 0.1, final_sparsity: *final, update_frequency: 0.5}
modifiers:
- !GMPruningModifier {<<: *base, start_epoch: 1, end_epoch: 5, params: *names}
"""
    assert only(text) == EXPECTED


def test_of_keys_that_stand_twice_the_last_counts_and_is_logged(caplog):
    text = ENTRY + "  mask_type: unstructured\n  mask_type: block4\n"
    assert only(text).pattern == "1x4"
    assert "keys stand twice, of which the last count: mask_type" in caplog.text


VARIABLES = """
num_epochs: 10
start: eval(num_epochs * 0.1)
final: 0.8
kind: cubic
names: [eval(which)]
which: 're:.*fc.weight'
modifiers:
- !GMPruningModifier
  init_sparsity: eval(final / 8)
  final_sparsity: eval(final)
  start_epoch: eval(start)
  end_epoch: eval(round(num_epochs / 2))
  update_frequency: eval(min(0.5, max(start, 2)))
  params: eval(names)
  inter_func: eval(kind)
"""


def test_equations_are_worked_out_anywhere():
    assert only(VARIABLES) == EXPECTED
    listed = VARIABLES.replace("params: eval(names)", "params: [eval(which)]")
    assert only(listed) == EXPECTED


def test_overrides_replace_variables_and_what_depends_on_them():
    changed = only(VARIABLES, num_epochs=20, final=0.4)
    assert changed.window == Window("2ep", "10ep", "0.5ep")
    assert changed.schedule == Schedule(0.05, 0.4, "cubic")


def test_an_unknown_override_is_an_error():
    with pytest.raises(
        RecipeError, match="unknown variable 'num_epoch'; did you mean 'num_epochs'"
    ):
        Recipe.load(VARIABLES, num_epoch=3)
    with pytest.raises(RecipeError, match="the recipe has no variables"):
        Recipe.load("modifiers:\n" + ENTRY, num_epochs=3)


STAGES = """
epochs: 4
share: 0.5
first:
  share: 0.25
  some_modifiers:
  - !MagnitudePruningModifier {init_sparsity: eval(share), final_sparsity: eval(share),
      start_epoch: 0, end_epoch: eval(epochs), update_frequency: 1, params: [a.weight]}
second:
  begin: eval(epochs)
  some_modifiers:
  - !MagnitudePruningModifier {init_sparsity: eval(share), final_sparsity: eval(share),
      start_epoch: eval(begin), end_epoch: eval(2 * epochs), update_frequency: 1, params: [b.weight]}
"""


def test_a_stages_own_variable_wins():
    first, second = Recipe.load(STAGES).modifiers
    assert (first.sparsity, first.window) == (0.25, None)
    assert (second.sparsity, second.window) == (0.5, Window("4ep"))


def test_an_override_reaches_the_stages():
    first, second = Recipe.load(STAGES, share=0.75).modifiers
    assert first.sparsity == second.sparsity == 0.75
    assert Recipe.load(STAGES, begin=5).modifiers[1].window == Window("5ep")


def test_a_variable_is_worked_out_once():
    asked = []

    class Counting(dict):
        def __getitem__(self, name):
            asked.append(name)
            return super().__getitem__(name)

    chain = {f"x{i}": f"eval(x{i + 1} + x{i + 1} + x{i + 1})" for i in range(12)}
    variables = Variables(Counting(chain, x12=1), Source("test"), ())
    assert variables["x0"] == 3**12
    assert sorted(asked) == sorted([*chain, "x12"])


def test_cycles_of_variables_are_found():
    text = "a: eval(b + 1)\nb: eval(c)\nc: eval(a)\nmodifiers:\n" + ENTRY.replace("0.1", "eval(a)")
    with pytest.raises(RecipeError, match="variables form a cycle: a -> b -> c -> a"):
        Recipe.load(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("__import__('os').system('true')", "is not allowed"),
        ("open('x')", "no function 'open'"),
        ("a.b", "is not allowed"),
        ("'text' * 3", "is not allowed"),
        ("[1][0]", "is not allowed"),
        ("1 if 2 else 3", "is not allowed"),
        ("9 ** 9 ** 9", "exponent .* too large"),
        ("1 / 0", "division by zero"),
        ("1e308 * 10", "the result is inf"),
        ("unknown + 1", "unknown variable 'unknown'"),
        ("word + 1", "word is 'x', no number"),
        ("1 +", "it takes numbers, variables"),
        ("1" * 600, "more than 500 characters"),
        ("(" * 300 + "1" + ")" * 100, "it takes numbers"),
        ("True + 1", "is not allowed"),
        ("", "it takes numbers"),
    ],
)
def test_equations_take_arithmetic_only(text, message):
    recipe = "word: x\nmodifiers:\n" + ENTRY.replace("0.1", '"eval(' + text + ')"')
    with pytest.raises(RecipeError, match=message):
        Recipe.load(recipe)


@st.composite
def arithmetic(draw, depth=3):
    if depth == 0 or draw(st.booleans()):
        return draw(st.sampled_from(["x", "y", "2", "0.5", "7"]))
    left, right = draw(arithmetic(depth=depth - 1)), draw(arithmetic(depth=depth - 1))
    form = draw(
        st.sampled_from(
            ["({} + {})", "({} - {})", "({} * {})", "max({}, {})", "min({}, {})", "-{} + {}"]
        )
    )
    return form.format(left, right)


@settings(deadline=None)
@given(arithmetic(), st.integers(-5, 5), st.floats(-3, 3, allow_nan=False))
def test_equations_say_what_python_says(text, x, y):
    variables = Variables({"x": x, "y": y}, Source("test"), ())
    expected = eval(text, {"max": max, "min": min}, {"x": x, "y": y})
    assert variables.fill(f"eval({text})", ()) == expected


def test_what_only_looks_like_an_equation_is_text():
    assert equation("evaluate(3)") is None
    assert equation("eval(3) + 1") is None
    assert equation(3) is None


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.block = nn.ModuleDict({"fc1": nn.Linear(8, 8), "fc2": nn.Linear(8, 8)})
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 4)


ALL = ["conv", "block.fc1", "block.fc2", "attention.in_proj_weight", "attention.out_proj", "head"]
CHOICES = {
    "__ALL_PRUNABLE__": ALL,
    "__ALL__": ALL,
    "[]": ALL,
    "[__ALL_PRUNABLE__]": ALL,
    "['re:.*weight']": ALL,
    "['re:block']": ["block.fc1", "block.fc2"],  # the beginning is enough
    "['re:lock']": None,  # but it must be the beginning
    "['re:block.fc']": ["block.fc1", "block.fc2"],
    "['re:block.fc$']": None,
    "['re:.*fc2.weight$', head.weight]": ["block.fc2", "head"],
    "[block.fc1.weight]": ["block.fc1"],
    "[module.block.fc1.weight, 're:module.head', 're:module\\.conv']": [
        "conv",
        "block.fc1",
        "head",
    ],
    "[block.fc]": None,
    "['re:norm.weight']": None,
    "['re:conv|block.fc2']": ["conv", "block.fc2"],
    "['re:(?!head).*']": ALL[:-1],  # neither does the class of the head match
    "['re:(?!head.weight).*']": ALL[:-1],  # nor its name as a layer
    "['re:Linear']": None,
    "['re:(?i)HEAD|CONV']": ["conv", "head"],
}


@pytest.mark.parametrize(("params", "expected"), CHOICES.items())
def test_parameters_are_found_as_sparseml_finds_them(params, expected):
    model = Net()
    recipe = Recipe.load(magnitude(params=params))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if expected is None:
        with pytest.raises(ValueError, match="matches nothing; nearest: "):
            prunus_attach(model, optimizer, recipe)
    else:
        session = prunus_attach(model, optimizer, recipe)
        assert [layer.name for layer in session.runs[0].layers] == expected


def prunus_attach(model, optimizer, recipe):
    import prunus

    return prunus.attach(model, optimizer, recipe, steps_per_epoch=2)


def test_a_dead_alternative_is_a_warning(caplog):
    params = "['re:(block.fc[1].weight)|(block.attn.[qkv].weight)']"
    model = Net()
    prunus_attach(
        model, torch.optim.SGD(model.parameters(), lr=0.1), Recipe.load(magnitude(params=params))
    )
    assert "alternative '(block.attn.[qkv].weight)' of pattern" in caplog.text
    assert caplog.text.count("matches nothing") == 1


def test_a_regex_that_does_not_compile_is_an_error_with_its_line():
    with pytest.raises(
        RecipeError, match=r"recipe:8: \[0\].params: .*'re:\(a' is not a regular expression"
    ):
        Recipe.load(ENTRY.replace('params: ["re:.*fc.weight"]', "\n  params: ['re:(a']"))


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("damp", "1e-7", 1e-7),
        ("damp", "'1e-7'", 1e-7),
        ("damp", "1.0e-6", 1e-6),
        ("damp", "null", 1e-7),
        ("num_grads", "512.0", 512),
        ("num_grads", "'512'", 512),
        ("fisher_block_size", "64", 64),
        ("num_recomputations", "null", 1),
    ],
)
def test_types_are_taken_leniently(setting, value, expected):
    text = magnitude(**{setting: value}).replace("Magnitude", "OBS")
    pruner = only(text).pruner
    assert isinstance(pruner, OBS)
    got = getattr(pruner, setting.removeprefix("fisher_"))
    assert got == expected
    assert type(got) is type(expected)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("num_grads", "1.5", "expected a whole number, not 1.5"),
        ("num_grads", "[1]", r"expected a number, not \[1\]"),
        ("damp", "small", "expected a number, not 'small'"),
        ("damp", ".nan", "expected a number, not nan"),
        ("damp", "-1", "damp=-1; a number above 0 is needed"),
        ("leave_enabled", "maybe", "expected true or false, not 'maybe'"),
        ("inter_func", "3", "expected text, not 3"),
        ("inter_func", "quadratic", "unknown inter_func 'quadratic'"),
        ("params", "[1, 2]", "expected a list of names"),
        ("final_sparsity", "1.5", "sparsity 1.5 is not between 0 and 1"),
        ("grad_sampler_kwargs", "8", "expected a mapping, not 8"),
        ("end_epoch", "null", "starts|window|end_epoch"),
        (
            "fisher_bock_size",
            "8",
            "unknown setting 'fisher_bock_size'; did you mean 'fisher_block_size'",
        ),
    ],
)
def test_what_does_not_fit_is_an_error(setting, value, message):
    text = magnitude(**{setting: value}).replace("Magnitude", "OBS")
    if setting == "end_epoch":
        assert only(text).window == Window("0ep", None, "1ep")  # to the end of training
        return
    with pytest.raises(RecipeError, match=message):
        Recipe.load(text)


def test_a_missing_setting_is_an_error():
    with pytest.raises(RecipeError, match="'final_sparsity' is required"):
        Recipe.load("!MagnitudePruningModifier {init_sparsity: 0.5}")


@pytest.mark.parametrize("word", ["true", "True", "yes", "'on'", "1"])
def test_booleans_have_many_spellings(word):
    assert only(magnitude(global_sparsity=word)).allocator is None  # magnitude's own: global


def test_ignored_settings_take_one_line_in_the_log(caplog):
    caplog.set_level(logging.INFO, logger="prunus")
    text = f"""
- !CAPruningModifier
{indented(ENTRY.split(chr(10), 1)[1], 0)}  traces_backup_dir: /somewhere
  blocks_in_parallel: 64
  block_implementation: fast
  log_types: __ALL__
- !EpochRangeModifier {{start_epoch: 0, end_epoch: 5, log_types: [python]}}
- !SparsificationLoggingModifier {{start_epoch: 0}}
"""
    assert len(Recipe.load(text).modifiers) == 1
    (line,) = [r.getMessage() for r in caplog.records]
    for name in ("traces_backup_dir", "blocks_in_parallel", "block_implementation", "log_types"):
        assert line.count(name) == 1


def test_recipes_of_what_came_after_sparseml_are_refused_by_name():
    text = "test_stage:\n  obcq_modifiers:\n    SparseGPTModifier: {sparsity: 0.5}\n"
    with pytest.raises(
        RecipeError, match=r"recipe:3: .*kind that llm-compressor reads.*!SparseGPTModifier"
    ):
        Recipe.load(text)


def test_native_recipes_are_read_as_ever():
    assert isinstance(only("modifiers:\n- keep: {}\n"), Keep)
    assert isinstance(only("modifiers:\n- learning_rate: {to: 0.1}\n"), LearningRate)
    with pytest.raises(RecipeError, match="'to' stands twice in the same mapping"):
        Recipe.load("modifiers:\n- learning_rate: {to: 0.1, to: 0.2}\n")
    with pytest.raises(ValueError, match="unknown dialect 'cab'; did you mean 'cap'"):
        Recipe.load(ENTRY, dialect="cab")
