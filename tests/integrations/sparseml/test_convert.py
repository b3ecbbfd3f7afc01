"""``prunus convert``: the same recipe in our own words."""

from pathlib import Path
from unittest import mock

import pytest
from typer.testing import CliRunner

from prunus import Recipe
from prunus.cli.main import app
from prunus.integrations.sparseml.convert import convert
from prunus.recipe import RecipeError

OLD = """\
version: 1.1.0
num_epochs: 20
training_modifiers:
- !EpochRangeModifier {start_epoch: 0, end_epoch: eval(num_epochs)}
- !LearningRateFunctionModifier {start_epoch: 0, end_epoch: eval(num_epochs), lr_func: linear,
    init_lr: 5e-4, final_lr: 1e-5, cycle_epochs: 5, cycle_mul: 0.5}
pruning_modifiers:
- !CAPruningModifier {init_sparsity: 0.3, final_sparsity: 0.75, start_epoch: 0, end_epoch: 16,
    update_frequency: 2, params: ['re:.*fc1.weight', head.weight], log_types: __ALL__}
- !QuantizationModifier
  start_epoch: 18
"""


def test_the_new_text_is_the_same_recipe():
    new = convert(OLD)
    assert Recipe.load(new) == Recipe.load(OLD, strict=False)
    assert Recipe.load(new).epochs == 20
    assert "!" not in "".join(line for line in new.splitlines() if not line.startswith("#"))


def test_comments_say_what_has_no_counterpart():
    new = convert(OLD)
    comments = " ".join(line.lstrip("# ") for line in new.splitlines() if line.startswith("#"))
    assert "from recipe, read as CAP's" in comments
    assert "line 10: !QuantizationModifier: skipped: prunus does not quantize" in comments
    assert "ignored, because no result depends on it: log_types" in comments
    assert all(len(line) <= 100 for line in new.splitlines())


def test_overrides_and_the_dialect_are_heard():
    assert Recipe.load(convert(OLD, overrides={"num_epochs": 30})).epochs == 30
    text = OLD.replace("!CAPruning", "!OBSPruning").replace(", cycle_mul: 0.5", "")
    assert "cycle: 5ep" not in convert(text)
    assert "cycle: 5ep" in convert(text, dialect="cap")


def test_what_is_no_old_recipe_is_refused():
    with pytest.raises(ValueError, match="no recipe of SparseML's or CAP's"):
        convert("modifiers:\n- keep: {}\n")
    with pytest.raises(RecipeError, match="nothing is left"):
        convert("- !QuantizationModifier {start_epoch: 3}\n")


def test_the_command_prints_or_writes(tmp_path):
    old, new = tmp_path / "old.md", tmp_path / "new.yaml"
    old.write_text("---\n" + OLD + "---\n# A card\n")

    def call(*args):
        done = CliRunner().invoke(app, ["convert", str(old), *args])
        assert done.exit_code == 0, done.output
        return done

    printed = call("--set", "num_epochs=24").stdout
    assert Recipe.load(printed).epochs == 24
    assert call("--output", str(new), "--dialect", "cap").stdout == ""
    assert Recipe.load(new) == Recipe.load(OLD, strict=False)


@pytest.mark.parametrize("name", ["old.yaml", "./old.yaml", "link.yaml"])
def test_the_command_does_not_write_over_its_recipe(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("old.yaml").write_text(OLD)
    Path("link.yaml").symlink_to("old.yaml")
    done = CliRunner().invoke(app, ["convert", "old.yaml", "--output", name])
    assert str(done.exception).endswith("is the recipe itself; give it another name")
    assert Path("old.yaml").read_text() == OLD


def test_the_command_leaves_a_file_as_it_is_where_the_disk_is_full(tmp_path):
    (tmp_path / "old.yaml").write_text(OLD)
    new = tmp_path / "new.yaml"
    new.write_text("what was there")
    with mock.patch("os.fsync", side_effect=OSError("no space left")):
        done = CliRunner().invoke(
            app, ["convert", str(tmp_path / "old.yaml"), "--output", str(new)]
        )
    assert isinstance(done.exception, OSError)
    assert new.read_text() == "what was there"
