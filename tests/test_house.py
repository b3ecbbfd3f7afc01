"""The plan of the house: folders on levels, imports go down, and the extras stay outside."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "prunus"
LEVELS = (
    ("solvers",),
    ("core", "formats", "spatial"),
    ("stats", "report"),
    ("pruners", "allocators", "hardware"),
    ("calibration",),
    ("engine", "execution", "channels"),
    ("modifiers",),
    ("recipe",),
    ("api",),
    ("integrations",),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
DOORS = {"__init__.py", "__main__.py", "_moved.py", "py.typed"}
EXTRAS = {"timm", "torchvision", "transformers", "lightning", "pytorch_lightning"}
EXTRAS |= {"accelerate", "wandb", "tensorboard", "matplotlib", "jinja2"}
FILES = sorted(path for path in SRC.rglob("*.py") if path.parent != SRC)
files = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))


def module(path):
    parts = ("prunus", *path.relative_to(SRC).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(path) for path in SRC.rglob("*.py")}


def imports(path, top_only=False):
    """Dotted names, of what is imported from a module too."""
    tree = ast.parse(path.read_text())
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def folder(name):
    return name.split(".")[1]


def test_the_folders_are_those_of_the_plan():
    found = {path.name for path in SRC.iterdir()} - {"__pycache__"}
    assert found == DOORS | set(LEVEL)


@files
def test_imports_go_down_and_take_public_names(path):
    for name in imports(path):
        if name.startswith("prunus.") and folder(name) != folder(module(path)):
            assert LEVEL[folder(name)] < LEVEL[folder(module(path))], name
            assert not any(part.startswith("_") for part in name.split(".")), name


def test_there_is_no_circle():
    graph = {module(path): set() for path in FILES if path.name != "__init__.py"}
    for path in FILES:
        if module(path) in graph:
            names = set(imports(path))
            graph[module(path)] = {n if n in graph else n.rpartition(".")[0] for n in names} & {
                *graph
            }
    graphlib.TopologicalSorter(graph).prepare()


@files
def test_third_parties_live_where_they_belong(path):
    names = {name.split(".")[0] for name in imports(path)}
    if LEVEL[folder(module(path))] < LEVEL["recipe"]:
        assert not names & {"pydantic", "yaml", "typer"}
    if folder(module(path)) != "integrations":
        assert not {name.split(".")[0] for name in imports(path, top_only=True)} & EXTRAS
    if folder(module(path)) == "solvers":
        assert names <= {*sys.stdlib_module_names, "torch", "numpy", "prunus"}


def underscored(name):
    return name.startswith("_") and not name.endswith("__")


def private_names():
    """What our modules, classes and objects keep to themselves."""
    for path in SRC.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(node, "name", None) or getattr(node, "attr", None)
            if isinstance(name, str) and underscored(name):
                yield name


def test_programs_use_public_names_only():
    research = Path(__file__).parents[1] / "research"
    trees = {path: ast.parse(path.read_text()) for path in research.rglob("*.py")}
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    private = set(private_names()) - defined
    for path, tree in trees.items():
        for name in imports(path):
            if name.startswith("prunus."):
                assert not any(map(underscored, name.split("."))), f"{path.name}: {name}"
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in private:
                assert ast.unparse(node.value) in ("self", "torch"), f"{path.name}: {node.attr}"


def test_tests_lie_as_the_code_does():
    tests = Path(__file__).parent
    beside = {"oracles", "helpers", "distributed", "research", "data"}
    folders = {path.relative_to(tests) for path in tests.rglob("*") if path.is_dir()}
    for path in sorted(folders):
        if path.name not in ("__pycache__", "data") and path.parts[0] not in beside:
            assert (SRC / path).is_dir(), path


HEAVY = {"torch._dynamo", "torch._inductor", "sympy", "scipy", "pydantic", "PIL", "pandas"}
BEYOND_TORCH = """
import sys, torch
known = set(sys.modules)
import prunus, prunus.cli.main
sys.argv = ["prunus", "--help"]
try:
    prunus.cli.main.main()
finally:
    print(*sorted(set(sys.modules) - known), sep="\\n", file=sys.stderr)
"""


def test_neither_the_package_nor_its_help_imports_what_is_slow_or_an_extra():
    call = [sys.executable, "-c", BEYOND_TORCH]
    loaded = subprocess.run(call, capture_output=True, text=True, check=True).stderr.split()
    packages = {".".join(name.split(".")[:depth]) for name in loaded for depth in (1, 2)}
    assert "prunus.cli" in packages
    assert not packages & (EXTRAS | HEAVY)


def test_the_package_is_typed():
    assert (SRC / "py.typed").is_file()
