"""Targets of the pruning steps in a window."""

import pytest

import prunus

from tests.helpers.training import sgd, train, two_layers

CYCLIC = """
modifiers:
  - prune:
      layers: ["0", "2"]
      sparsity: {from: 0.2, to: 0.8, curve: linear, cycle: 4step}
      window: {from: 2step, to: 10step, every: 2step}
"""


def test_a_cycle_begins_the_targets_anew_and_what_is_pruned_stays():
    model, seen = two_layers(), []
    optimizer = sgd(model)
    with prunus.attach(model, optimizer, CYCLIC) as session:
        (run,) = session.runs
        train(model, optimizer, 10, after=lambda _: seen.append(session.sparsity))
    assert run.ticks == [2, 4, 6, 8, 10]
    assert [run.target(i) for i in range(5)] == pytest.approx([0.2, 0.5, 0.2, 0.5, 0.8])
    assert seen == pytest.approx([0, 0.2, 0.2, *[0.5] * 6, 0.8], abs=3e-3)
