"""The plan of the house: imports go one way, and the extras stay outside."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src" / "prunus"
LEVELS = [
    {"names", "files", "patterns", "regexes", "schedules", "solvers", "masking", "timing"}
    | {"structure", "training_masks"}
    | {"linalg", "elimination", "column_sweep", "group_sweep", "refitting", "swapping", "admm"},
    {"layers", "ends", "fused", "selection", "stats"},
    {"pruners", "allocators", "permute"},
    {"calibration", "engine", "method", "distributed", "progress"}
    | {"memory", "gradients", "gradient_pass", "measuring", "shares", "solving", "tally"}
    | {
        "curvature",
        "recalibration",
        "input_pass",
        "sequential",
        "blocks",
        "looking",
        "permuting",
        "block_inputs",
        "block_recording",
        "block_walk",
        "lazy_weights",
        "finished_blocks",
        "execution",
        "semi_sparse",
        "channels",
    },
    {"modifiers"},
    {"recipe", "records", "report", "results", "session", "oneshot", "checkpoint", "accelerating"}
    | {"compat"},
    {"cli", "cli_arguments", "catalogue", "preview", "bench_table"}
    | {"integrations", "__init__", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
EXTRAS = {
    "timm",
    "torchvision",
    "transformers",
    "lightning",
    "pytorch_lightning",
    "accelerate",
    "wandb",
    "tensorboard",
    "matplotlib",
    "jinja2",
}
FILES = sorted(SRC.rglob("*.py"))


def part(path):
    return path.relative_to(SRC).with_suffix("").parts[0]


def imports(path, top_only=False):
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "prunus":
            yield from (f"prunus.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_every_file_has_a_level():
    assert {part(path) for path in FILES} == set(LEVEL)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_imports_go_one_way(path):
    mine = part(path)
    for name in imports(path):
        if name.startswith("prunus."):
            theirs = name.split(".")[1]
            below = LEVEL.get(theirs, 0) < LEVEL[mine]
            beside = LEVEL.get(theirs, 0) == LEVEL[mine] and LEVEL[mine] in (0, 1, 3, 5, 6)
            assert theirs == mine or below or beside, f"{mine} imports {theirs}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_third_parties_live_where_they_belong(path):
    names = {name.split(".")[0] for name in imports(path)}
    if LEVEL[part(path)] < 5:
        assert not names & {"pydantic", "yaml", "typer"}
    if part(path) not in ("integrations",):
        top = {name.split(".")[0] for name in imports(path, top_only=True)}
        assert not top & EXTRAS
    if LEVEL[part(path)] == 0:
        standard = set(sys.stdlib_module_names) | {"torch", "numpy", "prunus"}
        assert names <= standard


def test_importing_the_package_imports_no_extra():
    code = "import prunus, prunus.cli, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert not loaded & EXTRAS


def test_the_package_is_typed():
    assert (SRC / "py.typed").is_file()
