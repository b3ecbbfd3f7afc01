"""What ships with the repository runs: the demo and every recipe."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from timm.models import VisionTransformer

import prunus

from oracles import SINGLE

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


def small_vit():
    return VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=2, num_heads=2, num_classes=3
    )


MODELS = {"vit": small_vit}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_matches_its_family_and_runs_to_its_target(path, caplog):
    model = MODELS[path.parent.name]()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    recipe = prunus.Recipe.load(path)
    target = next(m for m in recipe.modifiers if m.name == "prune").schedule.final
    with prunus.attach(model, optimizer, recipe, steps_per_epoch=4, epochs=5) as session:
        for _ in range(20):
            model(torch.randn(2, 1, 8, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert session.sparsity == pytest.approx(target, abs=1e-3)
    assert "matches nothing" not in caplog.text


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_says_what_it_is_for(path):
    assert path.read_text().startswith("# ")


def test_the_demo_prints_its_table_and_writes_its_report(tmp_path):
    arguments = ["--output", str(tmp_path), "--epochs", "2", "--prune-epochs", "10"]
    command = [sys.executable, str(ROOT / "research" / "demo.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=SINGLE)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split("│") for line in done.stdout.splitlines() if line.startswith("│")]
    assert [row[1].strip() for row in rows] == [
        "dense",
        "one shot",
        "one shot",
        "one shot",
        "gradual",
    ]
    assert rows[-1][2].strip() == "0.90"
    assert (tmp_path / "report.html").is_file()
    compact, dense = (tmp_path / f"{n}.safetensors" for n in ("gradual", "dense"))
    assert compact.stat().st_size < dense.stat().st_size / 4
