"""Pruners, statistics and allocators from outside that are wrong: each is named, with the remedy."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import prunus
from prunus.engine import checked_calls
from prunus.pruners import PRUNERS


def mlp():
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))


def data():
    return prunus.Calibration([torch.randn(4, 8)])


def refused(pruner, match, allocator=None):
    """The error names the class and says what to do, and the model is as it was."""
    model = mlp()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=match):
        prunus.prune(model, pruner, sparsity=0.5, allocator=allocator, calibration=data())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def one(cls, **parts):
    """An object of the class, with these functions for parts of it."""
    functions = {name: staticmethod(function) for name, function in parts.items()}
    return type(cls.__name__, (cls,), functions)()


@dataclass(frozen=True)
class Scores(prunus.ScorePruner):
    name = "scores_toy"
    function = None

    def scores(self, w, stat, pattern, ranks):
        return self.function(w)


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda w: None, r"Scores.scores gives NoneType for 0; return floats of shape \(8, 8\)"),
        (lambda w: w > 0, "Scores.scores gives torch.bool for 0; return floats"),
        (lambda w: w.long(), "Scores.scores gives torch.int64"),
        (lambda w: w.sum(0), r"Scores.scores gives shape \(8,\)"),
        (lambda w: w.abs_(), r"Scores.scores changes 'w' in place .* as from w.clone\(\)"),
        (lambda w: w.mul_(0).abs() + 1, "Scores.scores changes 'w' in place"),
        (lambda w: w.T.fill_(3.0), "Scores.scores changes 'w' in place"),
    ],
)
def test_scores_that_are_none_are_named(function, match):
    refused(one(Scores, function=function), match)


@dataclass(frozen=True)
class Rebuild(prunus.ScorePruner):
    name = "rebuild_toy"
    function = None
    better = None

    def scores(self, w, stat, pattern, ranks):
        return w.abs()

    def refine(self, w, stat, mask, pattern):
        return mask if self.better is None else self.better(mask)

    def rebuild(self, w, stat, mask):
        return w if self.function is None else self.function(w, mask)


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda w, mask: w.mul_(mask), "Rebuild.rebuild changes 'w' in place"),
        (lambda w, mask: w * mask.fill_(True), "Rebuild.rebuild changes 'mask' in place"),
        (lambda w, mask: mask, "Rebuild.rebuild gives torch.bool"),
        (lambda w, mask: None, "Rebuild.rebuild gives NoneType"),
    ],
)
def test_new_weights_that_are_none_are_named(function, match):
    refused(one(Rebuild, function=function), match)


def test_a_refined_mask_that_is_none_is_named():
    refused(
        one(Rebuild, better=lambda mask: mask.float()), "Rebuild.refine gives a mask of torch.float"
    )


@dataclass(frozen=True)
class Solve(prunus.JointPruner):
    name = "solve_toy"
    function = None

    def solve(self, w, stat, pattern, drop, ranks):
        return self.function(w, ranks.keep_all_but_lowest(w.abs(), drop))


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda w, mask: w, "Solve.solve gives no pair for 0; return a new weight and a keep-mask"),
        (lambda w, mask: (w, mask.float()), "Solve.solve gives a mask of torch.float32"),
        (lambda w, mask: (w.mul_(mask), mask), "Solve.solve changes 'w' in place"),
        (lambda w, mask: (w[:1], mask), "Solve.solve gives shape"),
    ],
)
def test_solutions_that_are_none_are_named(function, match):
    refused(one(Solve, function=function), match)


def test_ranking_all_layers_is_refused_where_there_are_no_scores():
    refused(
        one(Solve, function=lambda w, mask: (w, mask)),
        "no scores here to rank all layers by",
        "global",
    )


class Half:
    """Sums of inputs, without the rest."""

    def update(self, x):
        pass

    def tensors(self):
        return []


class Unlimited(prunus.Statistic):
    reads = "gradients"

    def update(self, x):
        pass

    def tensors(self):
        return []


class Weights(Unlimited):
    reads = "weights"


class Rows(Unlimited):
    sampling = prunus.Sampling(4)
    by_rows = True


@dataclass(frozen=True)
class Measures(Scores):
    name = "measures_toy"
    kind = None

    def statistic(self, layer):
        return self.kind()


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        (Half, "statistic Half lacks reads, by_rows; derive it from prunus.Statistic"),
        (Unlimited, "statistic Unlimited: it reads gradients; say how many, as sampling ="),
        (Weights, "statistic Weights: reads is 'weights'; write 'inputs' or 'gradients'"),
        (Rows, "statistic Rows: it is by_rows; define with_rows"),
        (str, "statistic str lacks reads, by_rows, update, tensors"),
    ],
)
def test_half_a_statistic_is_named(kind, match):
    refused(one(Measures, kind=kind), match)


class Sums:
    """A whole statistic that derives from nothing, as of version 0.1."""

    reads = "inputs"
    by_rows = False

    def __init__(self):
        self.sums = torch.zeros(8)

    def update(self, x):
        self.sums += x.abs().sum(0)

    def tensors(self):
        return [self.sums]

    @property
    def nbytes(self):
        return 32


@dataclass(frozen=True)
class FirstOnly(prunus.ScorePruner):
    """Measures one layer, and none of the others."""

    name = "first_only_toy"

    def statistic(self, layer):
        return Sums() if layer.name == "0" else None

    def scores(self, w, stat, pattern, ranks):
        return w.abs() if stat is None else w.abs() * stat.sums


def test_layers_without_a_statistic_stand_beside_those_with_one():
    result = prunus.prune(mlp(), FirstOnly(), sparsity=0.5, calibration=data())
    assert [row.zeros for row in result.rows] == [32, 32]


@dataclass(frozen=True)
class Drops(prunus.Allocator):
    name = "drops_toy"
    function = None

    def allocate(self, problem):
        return self.function(problem)


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda p: [1, 1], r"allocator 'drops_toy' \(Drops\) gave no prunus.Allocation of 2"),
        (lambda p: prunus.Allocation(p.units, [1]), "gave no prunus.Allocation of 2 layers"),
        (lambda p: prunus.Allocation(p.units, [1, 0.5]), "drops 0.5 units of 1, where a whole"),
        (lambda p: prunus.Allocation(p.units, [1, 65]), r"drops 65 units .* to 64 is needed"),
    ],
)
def test_an_allocation_that_no_mask_can_meet_is_named(function, match):
    refused("magnitude", match, one(Drops, function=function))


@pytest.mark.parametrize(
    ("register", "base", "match"),
    [
        (prunus.register_pruner, prunus.ScorePruner, "pruner Empty lacks scores; derive it from"),
        (prunus.register_pruner, prunus.JointPruner, "pruner Empty lacks solve"),
        (prunus.register_allocator, prunus.Allocator, "allocator Empty lacks allocate"),
        (prunus.register_allocator, prunus.SignalAllocator, "Empty lacks allocate, signal"),
        (prunus.register_modifier, prunus.Modifier, r"modifier Empty lacks bind"),
        (prunus.register_modifier, object, r"modifier Empty lacks bind"),
        (prunus.register_statistic, prunus.Statistic, "statistic Empty lacks update, tensors"),
    ],
)
def test_registering_half_a_class_says_what_it_lacks(register, base, match):
    @dataclass(frozen=True)
    class Empty(base):
        name = "empty_toy"

    with pytest.raises(ValueError, match=match):
        register(Empty)

    class Plain(base):
        name = "plain_toy"

    if base is not prunus.Statistic:
        with pytest.raises(ValueError, match="Plain must be a frozen dataclass: write @dataclass"):
            register(Plain)


def test_a_name_that_is_a_setting_is_refused():
    @dataclass(frozen=True)
    class Named(prunus.ScorePruner):
        name: str = "named_toy"

    with pytest.raises(ValueError, match="Named: name is a setting, and should be the same"):
        prunus.register_pruner(Named)


def test_a_class_that_derives_from_nothing_gets_the_defaults(monkeypatch):
    monkeypatch.setattr(PRUNERS, "_classes", dict(PRUNERS._classes))

    @prunus.register_pruner
    @dataclass(frozen=True)
    class Old:
        name = "old_toy"
        patterns = ("unstructured",)
        allocator = "uniform"

        def statistic(self, layer):
            return None

        def scores(self, w, stat, pattern, ranks):
            return w.abs()

        def rebuild(self, w, stat, mask):
            return w

    assert isinstance(Old(), prunus.ScorePruner)
    old, ours = mlp(), mlp()
    ours.load_state_dict(old.state_dict())
    prunus.prune(old, "old_toy", sparsity=0.5)
    prunus.prune(ours, "magnitude", sparsity=0.5, allocator="uniform")
    assert all(torch.equal(a, b) for a, b in zip(old.parameters(), ours.parameters(), strict=True))


@dataclass(frozen=True)
class OldAllocator:
    name = "old_allocator_toy"

    def allocate(self, problem):
        return prunus.Allocation(problem.units, [8] * len(problem.units))


@dataclass(frozen=True)
class OldPruner:
    name = "old_pruner_toy"
    patterns = ("unstructured",)
    allocator = "uniform"

    def statistic(self, layer):
        return Sums()

    def scores(self, w, stat, pattern, ranks):
        return w.abs() * stat.sums

    def rebuild(self, w, stat, mask):
        return w


def test_objects_of_whole_classes_need_not_be_registered():
    result = prunus.prune(
        mlp(), OldPruner(), sparsity=0.5, allocator=OldAllocator(), calibration=data()
    )
    assert [row.zeros for row in result.rows] == [8, 8]
    assert not isinstance(OldAllocator(), prunus.SignalAllocator | prunus.ScorePruner)
    assert not isinstance(prunus.Magnitude(), prunus.JointPruner | prunus.Wanda)
    assert not isinstance(OldPruner(), prunus.Magnitude)


def test_a_method_of_ours_works_on_the_weights_themselves():
    layer = next(iter(prunus.prune(mlp(), "magnitude", sparsity=0.5).masks))
    assert layer == "0.weight"
    seen = []

    class Watched(prunus.Magnitude):
        def scores(self, w, stat, pattern, ranks):
            seen.append(w.data_ptr())
            return w.abs()

    model = mlp()
    prunus.prune(model, Watched(), sparsity=0.5, layers="0")
    assert seen != [model[0].weight.data_ptr()]  # a class from outside gets a copy
    Watched.__module__ = checked_calls.__name__
    seen.clear()
    prunus.prune(model, Watched(), sparsity=0.6, layers="0")
    assert seen == [model[0].weight.data_ptr()]
