"""Plugins: packages whose names the shell and recipes know, and what happens where one is broken."""

import logging
import os
import shutil
import subprocess
import sys

import pytest

from prunus.core import plugins
from prunus.core.names import Registry

from tests.oracles.pruning import ROOT, SINGLE

TOYS = ROOT / "tests" / "helpers" / "toy_plugin"
SCRIPT = """
import prunus, torch
from torch import nn

model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
data = prunus.Calibration([torch.randn(16, 8)])
recipe = '''
modifiers:
  - prune: {pruner: toy_std, allocator: {name: toy_first_dense, spread: 0.4}, sparsity: 0.5}
  - toy_clip: {limit: 0.01}
'''
result = prunus.prune(model, recipe, calibration=data)
print([row.zeros for row in result.rows])
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with prunus.attach(model, optimizer, "modifiers: [{toy_clip: {limit: 0.01}}]"):
    for _ in range(2):
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
print(max(float(p.detach().abs().max()) for p in model.parameters()) <= 0.0100001)
"""


def install(folder, package, module):
    """What pip would leave of a package with an entry point."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{plugins.GROUP}]\n{package} = {module}\n")


def run(folder, *args):
    env = {**SINGLE, "PYTHONPATH": f"{SINGLE['PYTHONPATH']}{os.pathsep}{folder}"}
    command = [sys.executable, "-W", "error", *args]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder)


@pytest.fixture
def site(tmp_path):
    """Where a good plugin and a broken one are installed."""
    shutil.copytree(TOYS, tmp_path / "toy_plugin")
    install(tmp_path, "toy-plugin", "toy_plugin")
    (tmp_path / "broken_plugin.py").write_text("import nowhere_to_be_found\n")
    install(tmp_path, "broken-plugin", "broken_plugin")
    return tmp_path


def test_a_toy_of_each_kind_is_under_forty_lines():
    for path in TOYS.glob("*.py"):
        assert len(path.read_text().splitlines()) < 40, path


def test_the_shell_lists_what_plugins_bring_and_warns_of_broken_ones(site):
    done = run(site, "-m", "prunus", "list")
    assert done.returncode == 0, done.stderr
    for kind in ("pruner", "allocator", "modifier", "statistic"):
        lines = [line.split() for line in done.stdout.splitlines()]
        assert any(line[:1] == [kind] and line[1].startswith("toy_") for line in lines), kind
    assert done.stderr.count("broken-plugin") == 2  # the plugin's name, and its package's
    assert "ModuleNotFoundError" in done.stderr
    assert "uninstall broken-plugin" in done.stderr


def test_recipes_name_what_plugins_bring(site):
    (site / "script.py").write_text(SCRIPT)
    done = run(site, "script.py")
    assert done.returncode == 0, done.stderr
    zeros, clipped = done.stdout.splitlines()
    first, second, third = map(int, zeros.strip("[]").split(","))
    assert first < second < third
    assert first + second + third == 3 * 64 / 2
    assert clipped == "True"


class Waiting:
    """An entry point that has been found and not been imported."""

    dist = None

    def __init__(self, name, load):
        self.name, self.value, self.load = name, f"{name}:it", load


@pytest.fixture
def waiting(monkeypatch):
    found = []
    monkeypatch.setattr(plugins, "_waiting", lambda: found)
    return found


@pytest.mark.parametrize("error", [ImportError("no"), ValueError("no"), SystemExit("no")])
def test_whatever_a_plugin_raises_is_one_warning_and_the_others_are_loaded(waiting, caplog, error):
    def fail():
        raise error

    loaded = []
    waiting += [Waiting("bad", fail), Waiting("good", lambda: loaded.append("good"))]
    registry = Registry("thing")
    registry.add("a", int)
    with caplog.at_level(logging.WARNING, "prunus"):
        assert list(registry) == ["a"]
        assert "b" not in registry
    assert loaded == ["good"]
    (record,) = caplog.records
    assert "plugin 'bad' (bad:it) cannot be used" in record.message


def test_a_plugin_may_look_names_up_while_it_is_imported(waiting):
    registry = Registry("thing")

    def load():
        registry.add("a", int)
        assert registry["a"] is int

    waiting.append(Waiting("good", load))
    assert registry["a"] is int


def test_importing_prunus_imports_no_plugin(site):
    done = run(site, "-c", "import prunus, sys; print('toy_plugin' in sys.modules)")
    assert done.stdout == "False\n", done.stderr


def test_a_name_that_another_class_has_is_refused():
    registry = Registry("thing")
    registry.add("a", int)
    with pytest.raises(ValueError, match="thing float: the name 'a' is taken by builtins.int"):
        registry.add("a", float)
    registry.add("a", int)
