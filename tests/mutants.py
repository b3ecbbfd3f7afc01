"""Small faults put into the code one at a time: does a test fail?

    python -m tests.mutants [--minutes 15] [--seed 0] [FOLDER ...]

Draws places at random in the folders of src/prunus, changes each in a copy of the tree, and runs
the tests that mirror the file and those that name its module. Prints ``killed`` or ``SURVIVED``
with the place and the change, or ``slow``, where the tests had not ended after two minutes of
computing or ten of waiting. Each run is a fork of this process, which has imported what does not
change.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("solvers", "core", "engine", "modifiers")
COMPUTING, WAITING = 120, 600  # seconds until tests that do not end are slow
LIBRARIES = ("torch", "torch._dynamo", "pytest", "pydantic", "yaml", "scipy.optimize", "typer")
COMPARISONS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add}
PAIRS = (("min", "max"), ("any", "all"), ("argmin", "argmax"), ("floor", "ceil"))
NAMES = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}


def mutant(node: ast.AST) -> ast.AST | None:
    """The changed node, if there is a change for its kind."""
    new = copy.deepcopy(node)
    if isinstance(new, ast.Compare) and len(new.ops) == 1 and type(new.ops[0]) in COMPARISONS:
        new.ops = [COMPARISONS[type(new.ops[0])]()]
    elif isinstance(new, ast.BinOp) and type(new.op) in ARITHMETIC:
        new.op = ARITHMETIC[type(new.op)]()
    elif isinstance(new, ast.BoolOp):
        new.op = ast.Or() if isinstance(new.op, ast.And) else ast.And()
    elif isinstance(new, ast.UnaryOp) and isinstance(new.op, ast.Not):
        return new.operand
    elif isinstance(new, ast.Constant) and type(new.value) is int:
        new.value += 1
    elif isinstance(new, ast.Name) and new.id in NAMES:
        new.id = NAMES[new.id]
    elif isinstance(new, ast.Attribute) and new.attr in NAMES:
        new.attr = NAMES[new.attr]
    elif removable(new):
        return ast.copy_location(ast.Pass(), node)
    else:
        return None
    return new


def removable(node: ast.AST) -> bool:
    """Statements without which the rest still has all its names."""
    if isinstance(node, ast.Assign):
        return all(isinstance(target, ast.Attribute | ast.Subscript) for target in node.targets)
    called = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    return called or isinstance(node, ast.AugAssign | ast.Raise)


Place = tuple[ast.AST, str, "int | None"]


def places(node: ast.AST) -> Iterator[Place]:
    """(parent, field, index) of all that runs: no annotations, decorators and messages."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "ctx", "op", "ops"):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST):
                yield node, field, index
                if not isinstance(child, ast.Raise | ast.JoinedStr):
                    yield from places(child)


def mutations(path: Path) -> list[tuple[int, str, str]]:
    """(line, what is changed, the whole new source) of each place in a file."""
    found, tree = [], ast.parse(path.read_text())
    for parent, field, index in places(tree):
        value = getattr(parent, field)
        node = value if index is None else value[index]
        if (new := mutant(node)) is not None:
            put(parent, field, index, new)
            found.append((node.lineno, f"{brief(node)} -> {brief(new)}", ast.unparse(tree)))
            put(parent, field, index, node)
    return found


def put(parent: ast.AST, field: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def brief(node: ast.AST) -> str:
    return ast.unparse(node).split("\n")[0][:60]


def tests_of(path: Path) -> list[str]:
    """Test files for a source file: its mirror image, then who names it, then its folder's."""
    inside = path.relative_to(ROOT / "src" / "prunus").with_suffix("")
    folder = ROOT / "tests" / inside.parent
    while not folder.is_dir():
        folder = folder.parent
    mirror, dotted = folder / f"test_{inside.name}.py", "prunus." + ".".join(inside.parts)
    named = [p for p in sorted((ROOT / "tests").rglob("test_*.py")) if dotted in p.read_text()]
    slow = {ROOT / "tests" / name for name in ("research", "distributed")}
    files = [mirror, *named, *sorted(folder.glob("test_*.py"))]
    kept = [p for p in dict.fromkeys(files) if p.is_file() and p.parent not in slow]
    if inside.name in ("ranks", "sharding"):  # which one process does not show
        kept += sorted((ROOT / "tests" / "distributed").glob("test_*.py"))
    return [str(p.relative_to(ROOT)) for p in kept]


def _run_tests(tree: Path, tests: list[str]) -> None:
    """Ends this process, with 0 if they pass."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CPU, (COMPUTING, COMPUTING))
    os.chdir(tree)
    sys.path[:0] = [str(tree / "src"), str(tree)]
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])  # of the ranks
    log = os.open(tree / "tests.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    os._exit(int(importlib.import_module("pytest").main([*options, *tests])))


def outcome(tree: Path, tests: list[str]) -> str:
    """What becomes of the tests in a copy of the tree."""
    if (pid := os.fork()) == 0:
        try:
            _run_tests(tree, tests)
        finally:
            os._exit(1)
    end = time.monotonic() + WAITING
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return "slow" if os.WIFSIGNALED(status) else "killed" if status else "SURVIVED"
        time.sleep(0.05)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "slow"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="*", default=FOLDERS)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sys.dont_write_bytecode = True  # files change within a second and keep their size
    for name in LIBRARIES:
        importlib.import_module(name)
    source = ROOT / "src" / "prunus"
    files = [path for folder in args.folders for path in sorted((source / folder).rglob("*.py"))]
    drawn = [(path, *mutation) for path in files for mutation in mutations(path)]
    print(f"{len(drawn)} places in {len(files)} files", flush=True)
    random.Random(args.seed).shuffle(drawn)
    end, results = time.monotonic() + 60 * args.minutes, Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        tree = Path(name) / "tree"
        ignored = shutil.ignore_patterns(".*", "__pycache__", "runs", "dist", "build")
        shutil.copytree(ROOT, tree, ignore=ignored)
        for path, line, change, text in drawn:
            if time.monotonic() > end:
                break
            there = tree / path.relative_to(ROOT)
            there.write_text(text)
            results[result := outcome(tree, tests_of(path))] += 1
            shutil.copy(path, there)
            print(f"{result:8} {path.relative_to(source)}:{line}  {change}", flush=True)
    print(", ".join(f"{count} {result}" for result, count in results.items()))


if __name__ == "__main__":
    main()
