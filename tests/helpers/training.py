"""A loop as anybody writes it, and states that are compared bit for bit."""

import torch
from torch import nn


def two_layers(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train(
    model,
    optimizer,
    steps,
    batches=None,
    *,
    seed=None,
    rows=4,
    target=0.0,
    before=lambda: None,
    after=lambda step: None,
):
    """Steps towards a mean square of outputs minus `target` of zero.

    Inputs are ``batches`` or (rows, 8) random ones: of the seed, or of the global generator.
    ``before`` is called between the gradients and the step, ``after`` with the number of the step.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    for step in range(1, steps + 1):
        x = torch.randn(rows, 8, generator=generator) if batches is None else batches[step - 1]
        (model(x.to(dtype)) - target).square().mean().backward()
        before()
        optimizer.step()
        after(step)
        optimizer.zero_grad()


def snapshot(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(one, other):
    """Whether two models, or states of models, have the same names and bits."""
    one, other = (m.state_dict() if isinstance(m, nn.Module) else m for m in (one, other))
    return one.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in one.items())
