"""The catalogue of recipes is that of the files."""

import re
import sys
from pathlib import Path

import pytest

from tests.oracles.pruning import ROOT

CATALOGUE = ROOT / "docs" / "recipe-catalogue.md"


@pytest.fixture
def generator():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import make_catalogue
    finally:
        sys.path.pop(0)
    return make_catalogue


def test_the_catalogue_is_that_of_the_files(generator):
    assert CATALOGUE.read_text() == generator.page(), "run: python docs/make_catalogue.py"


def test_the_catalogue_lists_every_recipe_once():
    rows = re.findall(r"^\| \[([^]]+)\]\(\.\./recipes/(\S+)\)", CATALOGUE.read_text(), re.MULTILINE)
    files = sorted((ROOT / "recipes").rglob("*.yaml"))
    assert sorted(link for _, link in rows) == [
        path.relative_to(ROOT / "recipes").as_posix() for path in files
    ]
    assert all(Path(link).stem == name for name, link in rows)


PRUNE = "modifiers:\n  - prune: {pruner: magnitude"
LEARN = "  - learning_rate: {curve: linear, from: 1e-2, to: 1e-3}\n"
RECIPES = {
    PRUNE + ", sparsity: 0.5}\n": ("magnitude", "one-shot", "0.5"),
    PRUNE + ", sparsity: 0.5}\n" + LEARN: ("magnitude", "one-shot + fine-tune", "0.5"),
    PRUNE + ', pattern: "2:4"}\n': ("magnitude", "one-shot", "2:4"),
    PRUNE + ", sparsity: {from: 0.1, to: 0.75}}\n": ("magnitude", "gradual", "0.75"),
    "modifiers:\n  - nm_training: {masking: ste}\n": ("ste", "N:M training", "2:4"),
    "modifiers:\n  - keep: {}\n" + LEARN: ("keep", "fine-tune only", "as loaded"),
    "modifiers:\n  - semi_sparse: {}\n" + PRUNE[11:] + ', pattern: "2:4"}\n': (
        "magnitude",
        "accelerated",
        "2:4",
    ),
}


@pytest.mark.parametrize(("text", "expected"), RECIPES.items())
def test_a_row_says_what_the_recipe_does(generator, monkeypatch, tmp_path, text, expected):
    monkeypatch.setattr(generator, "RECIPES", tmp_path / "recipes")
    path = tmp_path / "recipes" / "vit" / "some.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("# Try it (1 epoch).\n# More.\n" + text)
    link, *cells, purpose = generator.row(path)
    assert link == "[some](../recipes/vit/some.yaml)"
    assert tuple(cells) == expected
    assert purpose == "try it (1 epoch)"


def test_a_family_without_a_heading_is_an_error(generator, monkeypatch, tmp_path):
    monkeypatch.setattr(generator, "RECIPES", tmp_path)
    (tmp_path / "mamba").mkdir()
    (tmp_path / "mamba" / "some.yaml").write_text("# Try it.\n" + next(iter(RECIPES)))
    with pytest.raises(ValueError, match="recipes/mamba is not in FAMILIES"):
        generator.page()
