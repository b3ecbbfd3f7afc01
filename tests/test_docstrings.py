"""Every public name has an example in its docstring, and it runs."""

import doctest
import inspect
import os
import tempfile
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import prunus
from prunus.allocators import ALLOCATORS
from prunus.api.checkpoint import Checkpoint
from prunus.api.results import Result
from prunus.api.sweep_result import SweepResult
from prunus.modifiers import MODIFIERS
from prunus.pruners import PRUNERS
from prunus.stats import STATISTICS

NAMES = {name: getattr(prunus, name) for name in prunus.__all__}
NAMES |= {thing.__name__: thing for thing in (Checkpoint, Result, SweepResult)}
GLOBALS = {"prunus": prunus, "torch": torch, "nn": nn, "dataclass": dataclass}
GLOBALS |= {"os": os, "tempfile": tempfile, "__name__": "example"}


REGISTRIES = (PRUNERS, ALLOCATORS, MODIFIERS, STATISTICS)


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    """What examples register is gone after them."""
    for registry in REGISTRIES:
        monkeypatch.setattr(registry, "_classes", dict(registry._classes))


@pytest.mark.parametrize("name", sorted(NAMES))
def test_the_example_in_the_docstring_runs(name):
    text = inspect.getdoc(NAMES[name])
    assert text, f"{name} has no docstring"
    test = doctest.DocTestParser().get_doctest(text, dict(GLOBALS), name, None, None)
    assert test.examples, f"the docstring of {name} has no example"
    output = []
    runner = doctest.DocTestRunner(verbose=False)
    runner.run(test, out=output.append)
    assert not runner.failures, "".join(output)
