"""Recipes that come with the package are loaded by name."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import prunus
from prunus.recipe.files import shipped_recipes

ROOT = Path(__file__).parents[2]


def test_every_recipe_of_the_folder_is_loaded_by_its_name():
    files = sorted((ROOT / "recipes").glob("*/*.yaml"))
    assert len(files) > 50
    assert sorted(shipped_recipes().values()) == files
    for name in shipped_recipes():
        assert prunus.Recipe.load(name) == prunus.Recipe.load(ROOT / "recipes" / f"{name}.yaml")


def test_a_file_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "magnitude-90").write_text("modifiers: [keep: {}]")
    (modifier,) = prunus.Recipe.load("vit/magnitude-90").modifiers
    assert modifier.name == "keep"


def test_a_name_that_is_nearly_right_is_hinted_at():
    with pytest.raises(FileNotFoundError, match="did you mean 'vit/magnitude-90'"):
        prunus.Recipe.load("vit/magnitud-90")


def test_the_wheel_has_all_recipes(tmp_path):
    pytest.importorskip("hatchling")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    packed = {n.removeprefix("prunus/recipes/") for n in names if n.startswith("prunus/recipes/")}
    assert {f"{name}.yaml" for name in shipped_recipes()} <= packed
