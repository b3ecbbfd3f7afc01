"""Programs in processes of their own, forked from one that has imported what takes seconds.

A fork has imported what that process has: where a test is about what a program imports, start a
new interpreter.
"""

import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.distributed.workers"])
PATIENCE = 200  # seconds until a program that does not end counts as hanging


class Ended(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def _redirected(folder: Path, cwd: Path, function: Callable[..., Any], args: Any) -> None:
    import torch

    torch.set_num_threads(1)
    os.chdir(cwd)
    for number, name in ((1, "stdout"), (2, "stderr")):
        with open(folder / name, "wb") as file:
            os.dup2(file.fileno(), number)
    function(*args)


def _module(name: str, argv: list[str]) -> None:
    sys.argv = [name, *argv]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _script(path: str) -> None:
    sys.argv = [path]
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(path, run_name="__main__")


def call(function: Callable[..., Any], *args: Any, cwd: Path | None = None) -> Ended:
    """How a process ends that calls a function of a module, and what it has printed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = folder, cwd or Path.cwd(), function, args
        process = FORKS.Process(target=_redirected, args=arguments)
        process.start()
        process.join(PATIENCE)
        if process.exitcode is None:
            process.kill()
            process.join()
        texts = [(folder / stream).read_text() for stream in ("stdout", "stderr")]
        return Ended(process.exitcode, *texts)


def run_module(name: str, *argv: str, cwd: Path | None = None) -> Ended:
    """``python -m name argv``"""
    return call(_module, name, list(argv), cwd=cwd)


def run_script(path: Path, cwd: Path) -> Ended:
    """``python path``"""
    return call(_script, str(path), cwd=cwd)
