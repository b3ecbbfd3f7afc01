"""A calibration that cannot be used is told when attaching, not at the first pruning step."""

import logging

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import prunus

X = torch.randn(16, 8)
LATE = "modifiers: [prune: {pruner: %s, sparsity: 0.5, window: {from: 3step}}]"


def attach(pruner, calibration):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 8),
        nn.BatchNorm1d(8),
        nn.Dropout(),
        nn.Linear(8, 8),
        nn.ReLU(),
        nn.Linear(8, 2),
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return model, optimizer, prunus.attach(model, optimizer, LATE % pruner, calibration=calibration)


def mean_square(model, batch):
    return model(batch).square().mean()


def no_such_file(model, batch):
    raise OSError("no route to the data")


WRONG = {
    "no loss": ("cap", lambda: prunus.Calibration(DataLoader(X, 4)), "loss of one number"),
    "bare loader without loss": ("cap", lambda: DataLoader(X, 4), "loss of one number"),
    "no batches": ("wanda", lambda: prunus.Calibration([]), "no batches"),
    "no batches, bare": ("wanda", lambda: [], "no batches"),
    "another width": (
        "wanda",
        lambda: [torch.randn(4, 7)],
        "first batch cannot be used: RuntimeError",
    ),
    "text": ("wanda", lambda: "wikitext", "calibration is a str"),
    "one tensor": ("wanda", lambda: X, "calibration is a Tensor"),
    "a number": ("wanda", lambda: 3, "calibration is a int"),
    "unknown keywords": (
        "wanda",
        lambda: [{"pixels": X}],
        r"have 'pixels', which Sequential.forward\(input\) does not take",
    ),
    "forward gives an output": (
        "cap",
        lambda: prunus.Calibration([X], forward=lambda m, b: m(b)),
        "one number",
    ),
}


@pytest.mark.parametrize(("pruner", "make", "match"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_used_is_told_when_attaching(pruner, make, match):
    with pytest.raises(ValueError, match=match):
        attach(pruner, make())


def test_batches_alone_are_wrapped():
    model, optimizer, session = attach("wanda", DataLoader(X, 4))
    for _ in range(4):
        model(X).square().mean().backward()
        optimizer.step()
    session.close()
    assert session.sparsity == 0.5


def test_trying_changes_neither_the_model_nor_random_numbers():
    generator = torch.Generator().manual_seed(1)
    loader = DataLoader(X, 4, shuffle=True, generator=generator)
    torch.manual_seed(0)
    plain = attach("wanda", [X])[0].state_dict()
    expected, order = torch.rand(3), generator.get_state()
    model, *_ = attach("cap", prunus.Calibration(loader, forward=mean_square))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(generator.get_state(), order)
    assert all(torch.equal(t, plain[name]) for name, t in model.state_dict().items())
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_data_that_cannot_be_read_just_now_is_no_fault_of_the_calibration(caplog):
    with caplog.at_level(logging.WARNING, "prunus"):
        attach("cap", prunus.Calibration([X], forward=no_such_file))
    assert "could not be tried: no route to the data" in caplog.text


def test_data_that_nothing_reads_is_not_tried():
    attach("magnitude", prunus.Calibration([]))
