"""The page on scaling says what its script computes, and that is what a step is planned to take."""

import pytest
import torch
from torch import nn

import prunus

pytest.importorskip("timm")
pytest.importorskip("transformers")

from research.benchmarks import costs, scaling
from tests.oracles.pruning import ROOT

PAGE = ROOT / "docs" / "scaling.md"


@pytest.mark.parametrize("case", scaling.CASES, ids=lambda case: case.name)
def test_the_page_shows_the_tables_of_the_script(case):
    message = "run: python -m research.benchmarks.scaling --predict, and put the tables in the page"
    assert scaling.predict(case) in PAGE.read_text(), message


@pytest.mark.parametrize("name", costs.methods(8))
@pytest.mark.parametrize("memory", [1 << 40, 6000])
def test_bytes_and_readings_are_those_of_the_plan(name, memory):
    pruner = costs.methods(8)[name]
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(24, 20), nn.Tanh(), nn.Linear(20, 24), nn.Linear(24, 4))
    mine = costs.Costs(pruner, model, tokens=4, sequential=False)
    data = prunus.Calibration((), memory=memory)
    plan = prunus.PruningModifier(pruner, 0.5).plan(model, data)
    if memory == 1 << 40:
        assert mine.statistics() == plan.memory()["statistics"]
    if mine.stats:
        assert mine.readings(1, memory) == plan.passes()
