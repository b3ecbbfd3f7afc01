"""Optimizers in optimizers: masks hold after the last word, and only real steps count."""

import pytest
import torch
from torch import nn

import prunus

AT_ONCE = "modifiers: [{prune: {sparsity: 0.75, layers: ['*']}}]"


class Lookahead(torch.optim.Optimizer):
    """Slow weights overwrite the fast ones after the inner step; no `Optimizer.__init__`."""

    def __init__(self, optimizer, k=2):
        self.optimizer, self.k, self.count = optimizer, k, 0
        self.param_groups, self.state = optimizer.param_groups, {}
        self.slow = [p.detach().clone() for p in self.param_groups[0]["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        self.optimizer.step(closure)
        self.count += 1
        if self.count % self.k == 0:
            for p, slow in zip(self.param_groups[0]["params"], self.slow, strict=True):
                p.copy_(slow.lerp_(p, 0.5))


class EverySecond(torch.optim.Optimizer):
    """A loop's own handle for gradient accumulation."""

    def __init__(self, optimizer):
        self.optimizer, self.count = optimizer, 0
        self.param_groups, self.state = optimizer.param_groups, {}

    def step(self, closure=None):
        self.count += 1
        if self.count % 2 == 0:
            self.optimizer.step(closure)


class Chained(torch.optim.Optimizer):
    """One optimizer for some weights, another for the rest."""

    def __init__(self, *optimizers):
        super().__init__([p for o in optimizers for g in o.param_groups for p in g["params"]], {})
        self.optimizers = list(optimizers)

    def step(self, closure=None):
        for optimizer in self.optimizers:
            optimizer.step(closure)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1, momentum=0.9)


def train(model, optimizer, steps):
    for _ in range(steps):
        model.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        yield


@pytest.mark.parametrize(
    "recipe", [AT_ONCE, "modifiers: [{nm_training: {layers: ['*'], window: {to: 3step}}}]"]
)
def test_masks_hold_where_slow_weights_come_after_the_inner_step(recipe):
    model = net()
    optimizer = Lookahead(sgd(model.parameters()))
    with prunus.attach(model, optimizer, recipe) as session:
        for step, _ in enumerate(train(model, optimizer, 6), 1):
            assert session.step == step
            for name, mask in session.masks.items():
                assert not model.get_parameter(name)[~mask].any()
    assert not session.verify()


def test_momentum_inside_a_wrapped_optimizer_goes_with_its_weight():
    model = net()
    inner = sgd(model.parameters())
    optimizer = Lookahead(inner)
    recipe = "modifiers: [{prune: {sparsity: 0.75, layers: ['*'], window: {from: 3step}}}]"
    with prunus.attach(model, optimizer, recipe) as session:
        list(train(model, optimizer, 3))
        for name, mask in session.masks.items():
            buffer = inner.state[model.get_parameter(name)]["momentum_buffer"]
            assert not buffer[~mask].any()
            assert buffer[mask].any()


def test_a_call_that_steps_nothing_is_no_step():
    model = net()
    optimizer = EverySecond(sgd(model.parameters()))
    recipe = "modifiers: [{prune: {sparsity: 0.75, layers: ['*'], window: {from: 3step}}}]"
    with prunus.attach(model, optimizer, recipe) as session:
        steps = [(session.step, bool(session.masks)) for _ in train(model, optimizer, 6)]
    assert steps == [(0, False), (1, False), (1, False), (2, False), (2, False), (3, True)]


def test_two_optimizers_in_one_are_one_step():
    model = net()
    optimizer = Chained(sgd(model[0].parameters()), sgd(model[2].parameters()))
    with prunus.attach(model, optimizer, AT_ONCE) as session:
        list(train(model, optimizer, 3))
        assert session.step == 3
    assert session.sparsity == pytest.approx(0.75, abs=0.01)


def test_an_inner_optimizer_that_is_stepped_by_itself_is_told_once(caplog):
    model = net()
    inner = sgd(model.parameters())
    with prunus.attach(model, Lookahead(inner), AT_ONCE) as session:
        list(train(model, inner, 3))
        assert session.step == 0
    assert caplog.text.count("SGD has stepped outside of step() of the optimizer") == 1
