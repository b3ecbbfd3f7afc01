"""Batches as people have them: understood, or refused by name with what to do."""

import numpy as np
import pytest
import torch
from torch import nn

import prunus
from prunus.calibration.batches import call_of

X, M, Y = torch.randn(4, 8), torch.ones(4, 8), torch.randn(4, 2)


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 2)
        self.calls = []

    def run(self, x, **seen):
        self.calls.append({"x": x, **seen})
        return self.b(self.a(x).tanh())


class One(Base):
    def forward(self, x):
        return self.run(x)


class WithMask(Base):
    def forward(self, x, attention_mask=None, other=None):
        return self.run(x, mask=attention_mask)


class Two(Base):
    def forward(self, x, z):
        return self.run(x + z, z=z)


class WithFlag(Base):
    def forward(self, x, return_features=False):
        return self.run(x)


class AnyKey(Base):
    def forward(self, x, **rest):
        return self.run(x, **rest)


def mse(output, y):
    return nn.functional.mse_loss(output, y)


def targets(output, batch):
    return nn.functional.mse_loss(output, batch["y"])


UNDERSTOOD = {
    "a tensor": (One, X, None, {"x": X}),
    "a pair": (One, (X, Y), mse, {"x": X}),
    "a pair without a loss": (One, (X, Y), None, {"x": X}),
    "a list": (One, [X], None, {"x": X}),
    "a mask and targets": (WithMask, (X, M, Y), mse, {"x": X, "mask": M}),
    "a mask and targets, no loss": (WithMask, (X, M, Y), None, {"x": X, "mask": M}),
    "two inputs": (Two, (X, M), None, {"x": X + M, "z": M}),
    "two inputs and targets": (Two, (X, M, Y), mse, {"x": X + M, "z": M}),
    "a mapping": (WithMask, {"x": X, "attention_mask": M}, None, {"x": X, "mask": M}),
    "a mapping with targets": (One, {"x": X, "y": Y}, targets, {"x": X}),
    "any key": (AnyKey, {"x": X, "y": Y}, None, {"x": X, "y": Y}),
    "a mapping and targets": (WithMask, ({"x": X, "attention_mask": M}, Y), mse, {"mask": M}),
    "names besides": (AnyKey, {"x": X, "names": ["a", "b"]}, None, {"names": ["a", "b"]}),
}


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_the_model_is_called_with_what_is_its_own(name):
    build, batch, loss_fn, seen = UNDERSTOOD[name]
    model = build()
    data = prunus.Calibration([batch], loss_fn)
    result = prunus.prune(model, "wanda", sparsity=0.5, calibration=data)
    assert result.sparsity == 0.5
    for key, value in seen.items():
        got = model.calls[0][key]
        assert torch.equal(got, value) if isinstance(value, torch.Tensor) else got == value
    if loss_fn is not None:
        assert data.loss(model, batch) == mse(model.run(model.calls[0]["x"]), Y)


REFUSED = {
    "three parts": (One, (X, M, Y), None, r"have 3 parts, and One.forward\(x\) does not tell"),
    "three parts with a loss": (One, (X, M, Y), mse, r"which are inputs and targets; give pairs"),
    "a flag in the mask's place": (WithFlag, (X, M, Y), mse, r"WithFlag.forward\(x, return_feat"),
    "four parts": (WithMask, (X, M, M, Y), mse, "have 4 parts, and WithMask"),
    "a key too many": (One, {"x": X, "idx": Y}, None, r"have 'idx', which One.forward\(x\) does"),
    "a key misspelt": (
        WithMask,
        {"x": X, "attention_masks": M},
        None,
        "have 'attention_masks', which .* did you mean 'attention_mask'",
    ),
    "text": (One, ["a text", "another"], None, "hold text; make tokens of it first"),
    "text and labels": (One, (["a text"], Y), mse, "hold text; make tokens of it first"),
    "text in a mapping": (One, {"text": ["a", "b"]}, None, "hold text; make tokens"),
    "arrays": (One, np.zeros((4, 8)), None, "numpy arrays; use torch.as_tensor"),
    "arrays in a pair": (One, (np.zeros((4, 8)), Y), mse, "numpy arrays"),
    "numbers": (One, [[1, 2], [3, 4]], None, "hold int where tensors belong"),
    "lists of tokens": (One, {"x": [[1, 2], [3]]}, None, "hold int where tensors belong"),
    "nothing": (One, None, None, "hold NoneType where tensors belong"),
    "no parts": (One, (), None, "a calibration batch is empty"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_leaves_it_open_is_refused_with_what_to_do(name):
    build, batch, loss_fn, match = REFUSED[name]
    with pytest.raises(ValueError, match=match):
        call_of(build(), batch, loss_fn is not None)
    with pytest.raises(ValueError, match=match):
        prunus.prune(
            build(), "wanda", sparsity=0.5, calibration=prunus.Calibration([batch], loss_fn)
        )


def test_forward_takes_anything():
    texts = [["a text", "another"]]
    data = prunus.Calibration(texts, forward=lambda model, batch: model(torch.randn(len(batch), 8)))
    assert prunus.prune(One(), "wanda", sparsity=0.5, calibration=data).sparsity == 0.5


def test_a_model_that_writes_to_its_inputs_leaves_the_batches_as_they_were():
    class Writes(One):
        def forward(self, x):
            return self.run(x.sub_(1))

    batches = [torch.randn(4, 8)]
    before = batches[0].clone()
    prunus.prune(Writes(), "wanda", sparsity=0.5, calibration=prunus.Calibration(batches))
    assert torch.equal(batches[0], before)
