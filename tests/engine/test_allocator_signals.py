"""OWL and AlphaPruning beside their formulas, and how an allocator gets to look."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import prunus
from prunus.allocators import OWL, AlphaPruning, Problem, Unit
from prunus.allocators.alphapruning import tail_exponent
from prunus.core.blocks import by_block, find_blocks
from prunus.core.layers import all_layers
from prunus.core.patterns import parse_pattern
from prunus.engine.allocator_signals import with_signals
from prunus.engine.method import Method
from prunus.stats import InputNorm

from tests.oracles.layerwise import hill, inputs_of, outliers

FEW = settings(deadline=None, max_examples=25)


class Block(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    """Blocks of different sizes between two layers that are in none."""

    def __init__(self, hidden=(8, 24, 12)):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.blocks = nn.ModuleList([Block(8, size) for size in hidden])
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def data():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 6, generator=generator).exp() for _ in range(3)]


def rough():
    """A model of which the second block has large weights in some places."""
    model = Model()
    with torch.no_grad():
        model.blocks[1].up.weight[::3, ::2] *= 30
    return model


def signals(allocator, model, chosen=None):
    layers = list(all_layers(model))
    method = Method(prunus.Magnitude(), parse_pattern("row"), allocator)
    return with_signals(method, layers, model, prunus.Calibration(data())).signals


def units(sizes, pruned=None):
    pruned = pruned or [0] * len(sizes)
    return [
        Unit(str(i), (size, 1), size, gone)
        for i, (size, gone) in enumerate(zip(sizes, pruned, strict=True))
    ]


def allocate(allocator, sizes, target, seen, pruned=None):
    table = {str(i): look for i, look in enumerate(seen)}
    problem = Problem(units(sizes, pruned), target, lambda k: [], table)
    return allocator.allocate(problem)


@pytest.mark.parametrize("times", [1.0, 3.0, 5.0])
def test_owl_sees_the_share_of_outliers_of_a_block(times):
    model = rough()
    inputs = inputs_of(model, data())
    seen = signals(OWL(outlier=times), model)
    groups = [
        ["first"],
        *([f"blocks.{i}.up", f"blocks.{i}.down"] for i in range(3)),
        ["last"],
    ]
    for names in groups:
        weights = [model.get_submodule(name).weight.detach() for name in names]
        expected = outliers(weights, [inputs[name].norm(dim=0) for name in names], times)
        assert [seen[name] for name in names] == [pytest.approx(expected)] * len(names)


def test_alphapruning_sees_the_mean_exponent_of_a_block():
    model = rough().double()
    seen = signals(AlphaPruning(), model)
    for i in range(3):
        names = [f"blocks.{i}.up", f"blocks.{i}.down"]
        weights = [model.get_submodule(name).weight.detach() for name in names]
        # the shorter side, or the rest of the eigenvalues is zero
        exponents = [hill(w if w.shape[0] >= w.shape[1] else w.T) for w in weights]
        assert [seen[n] for n in names] == [pytest.approx(sum(exponents) / 2)] * 2


def test_layers_of_a_block_are_seen_together_and_others_alone():
    model = Model()
    groups = by_block(find_blocks(model), list(all_layers(model)))
    assert [[layer.name for layer in group] for group in groups] == [
        ["first"],
        *([f"blocks.{i}.up", f"blocks.{i}.down"] for i in range(3)),
        ["last"],
    ]
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert [len(group) for group in by_block(find_blocks(plain), list(all_layers(plain)))] == [1, 1]


@pytest.mark.parametrize("alpha", [2.5, 3.5])
@pytest.mark.parametrize("shape", [(600, 600), (400, 900), (900, 400)])
def test_the_exponent_of_a_power_law_is_found(alpha, shape):
    count = min(shape)
    generator = torch.Generator().manual_seed(0)
    places = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    eigenvalues = places ** (-1 / (alpha - 1))  # density l^-alpha above 1
    square = torch.randn(max(shape), max(shape), generator=generator, dtype=torch.float64)
    q = torch.linalg.qr(square[:, :count]).Q
    w = q * eigenvalues.sqrt()
    w = w if shape[0] >= shape[1] else w.T
    assert tail_exponent(w) == pytest.approx(alpha, rel=0.15)
    assert tail_exponent(7 * w) == pytest.approx(tail_exponent(w))
    assert tail_exponent(w.float()) == pytest.approx(tail_exponent(w), rel=1e-3)


@pytest.mark.parametrize(
    "w", [torch.zeros(4, 4), torch.eye(4), torch.ones(3, 5), torch.ones(1, 1), torch.ones(1, 7)]
)
def test_weights_without_a_tail_have_a_finite_exponent(w):
    assert math.isfinite(tail_exponent(w))


SIZES = st.lists(st.tuples(st.integers(1, 400), st.floats(0, 1)), min_size=1, max_size=6)


@given(SIZES, st.floats(0, 1), st.sampled_from([OWL(), OWL(spread=0.3), AlphaPruning()]))
@FEW
def test_the_target_is_met_exactly_whatever_is_seen(rows, target, allocator):
    sizes, seen = zip(*rows, strict=True)
    plan = allocate(allocator, sizes, target, seen)
    assert sum(plan.drop) == round(target * sum(sizes))
    assert all(0 <= drop <= size for drop, size in zip(plan.drop, sizes, strict=True))


@given(SIZES, st.floats(0, 1), st.data(), st.sampled_from([OWL(), AlphaPruning()]))
@FEW
def test_what_is_pruned_stays_pruned(rows, target, data, allocator):
    sizes, seen = zip(*rows, strict=True)
    pruned = [data.draw(st.integers(0, size)) for size in sizes]
    plan = allocate(allocator, sizes, target, seen, pruned)
    assert sum(plan.drop) == max(round(target * sum(sizes)), sum(pruned))
    assert all(low <= drop for drop, low in zip(plan.drop, pruned, strict=True))


@pytest.mark.parametrize("allocator", [OWL(), AlphaPruning()])
def test_equal_looks_give_uniform_shares(allocator):
    sizes = [100, 300, 200]
    assert allocate(allocator, sizes, 0.5, [0.7] * 3).drop == [50, 150, 100]


@pytest.mark.parametrize("target", [0.5, 0.7])
def test_owl_spreads_shares_around_the_target_as_the_paper_does(target):
    seen, sizes, spread = [0.02, 0.05, 0.03, 0.10], [1000] * 4, 0.08
    # 1 - s of the paper: signals from 0 to 2 lambda, shifted so that their mean is the target's
    places = np.array(seen) - min(seen)
    density = places / places.max() * 2 * spread
    density += (1 - target) - density.mean()
    plan = allocate(OWL(spread=spread), sizes, target, seen)
    for drop, dense in zip(plan.drop, density, strict=True):
        assert drop / 1000 == pytest.approx(1 - dense, abs=1e-3)


def test_alphapruning_spreads_shares_as_the_paper_does():
    seen, sizes, target, spread = [2.0, 3.5, 6.0, 2.5], [1000, 3000, 500, 2000], 0.6, 0.3
    rates = [(1 - spread) + (x - min(seen)) / (max(seen) - min(seen)) * 2 * spread for x in seen]
    scale = target * sum(sizes) / sum(r * n for r, n in zip(rates, sizes, strict=True))
    plan = allocate(AlphaPruning(spread=spread), sizes, target, seen)
    for drop, rate, size in zip(plan.drop, rates, sizes, strict=True):
        assert abs(drop - scale * rate * size) <= 1


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6), st.floats(0.2, 0.8))
@FEW
def test_more_outliers_are_denser_and_higher_exponents_sparser(seen, target):
    sizes = [1000] * len(seen)
    for allocator, sign in ((OWL(), -1), (AlphaPruning(), 1)):
        drops = allocate(allocator, sizes, target, seen).drop
        order = sorted(range(len(seen)), key=lambda i: seen[i])
        for low, high in itertools.pairwise(order):
            assert sign * (drops[high] - drops[low]) >= -1


@pytest.mark.parametrize(
    ("allocator", "arguments"),
    [(OWL, {"spread": 1.0}), (OWL, {"outlier": 0}), (AlphaPruning, {"spread": -0.1})],
)
def test_settings_out_of_range_are_refused(allocator, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        allocator(**arguments)


# in a run


@pytest.mark.parametrize("name", ["owl", "alphapruning"])
@pytest.mark.parametrize("pruner", ["magnitude", "wanda", "sparsegpt"])
def test_a_run_prunes_to_the_allocation_of_the_dense_model(name, pruner):
    model = rough()
    allocator = {"owl": OWL(), "alphapruning": AlphaPruning()}[name]
    layers = [layer for layer in all_layers(model) if layer.name.startswith("blocks")]
    method = Method(prunus.Magnitude(), parse_pattern("row"), allocator)
    seen = with_signals(method, layers, model, prunus.Calibration(data())).signals
    whole = [Unit(layer.name, layer.shape, layer.weight.numel(), 0) for layer in layers]
    plan = allocator.allocate(Problem(whole, 0.5, lambda k: [], seen))
    result = prunus.prune(
        model,
        pruner,
        sparsity=0.5,
        layers=["blocks.*"],
        allocator=name,
        calibration=prunus.Calibration(data()),
    )
    assert result.sparsity == 0.5
    assert [row.zeros for row in result.rows] == list(plan.drop)
    assert len({round(row.sparsity, 2) for row in result.rows}) > 1


def test_a_recipe_looks_as_the_call_does():
    text = """
modifiers:
  - prune:
      pruner: wanda
      sparsity: 0.5
      layers: ["blocks.*"]
      allocator: {name: owl, outlier: 3, spread: 0.1}
"""
    model, again = rough(), Model()
    again.load_state_dict(model.state_dict())
    result = prunus.prune(model, text, calibration=prunus.Calibration(data()))
    prunus.prune(
        again,
        "wanda",
        sparsity=0.5,
        layers=["blocks.*"],
        allocator=OWL(outlier=3, spread=0.1),
        calibration=prunus.Calibration(data()),
    )
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    assert result.rows[2].sparsity < result.sparsity  # of the block with outliers
    assert prunus.Recipe.load(result.recipe.to_yaml()) == result.recipe


def test_looking_twice_sees_the_same_and_changes_nothing():
    model = rough().train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    assert signals(OWL(), model) == signals(OWL(), model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_a_method_that_has_seen_does_not_look_again():
    model = Model()
    method = Method(prunus.Magnitude(), parse_pattern("row"), OWL(), {"first": 0.5})
    assert with_signals(method, list(all_layers(model)), model, None) is method


def test_owl_without_data_says_so_and_alphapruning_needs_none():
    model = rough()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="allocator 'owl' learns from data; pass calibration="):
        prunus.prune(model, "magnitude", sparsity=0.5, allocator="owl")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert prunus.prune(model, "magnitude", sparsity=0.5, allocator="alphapruning").sparsity == 0.5


def test_layers_with_shared_inputs_are_looked_at_like_others():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(6, 8), nn.Linear(6, 8)

        def forward(self, x):
            return self.q(x) + self.k(x)

    model = Two()
    seen = signals(OWL(outlier=1.5), model)
    norm = InputNorm(6)
    norm.update(torch.cat(data()))
    for name in "qk":
        w = model.get_submodule(name).weight.detach()
        assert seen[name] == pytest.approx(outliers([w], [norm.norm], 1.5))
