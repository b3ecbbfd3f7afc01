"""N:M training that is interrupted goes on bit for bit."""

import io
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import prunus

from tests.oracles.nm import (
    BEGIN,
    END,
    OPTIMIZERS,
    PLACES,
    RULES,
    STEPS,
    STRUCTURES,
    data,
    model_of,
    recipe,
    step,
)


class Training:
    """A model, its optimizer and its session, in a process of their own as it were."""

    def __init__(self, place, make, text, state=None):
        self.model = model_of(place)
        if state is not None:
            self.model.load_state_dict(state)
        self.optimizer = make(self.model.parameters())
        self.session = prunus.attach(self.model, self.optimizer, text)

    def run(self, batches):
        for x, y in batches:
            step(self.model, self.optimizer, x, y)
        return self

    def saved(self):
        buffer = io.BytesIO()
        parts = self.model, self.optimizer, self.session
        torch.save([part.state_dict() for part in parts], buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=True)

    def same_as(self, other):
        ours, theirs = self.model.state_dict(), other.model.state_dict()
        masks = other.session.masks
        assert all(torch.equal(t, theirs[name]) for name, t in ours.items())
        assert all(torch.equal(mask, masks[name]) for name, mask in self.session.masks.items())
        assert self.session.masks.keys() == masks.keys()
        return True


def resumed(place, make, text, state, order):
    """Model, optimizer and session states loaded in one of the orders in which people do it."""
    model, optimizer, session = state
    if order == "model before attaching":
        new = Training(place, make, text, model)
        new.optimizer.load_state_dict(optimizer)
        new.session.load_state_dict(session)
        return new
    new = Training(place, make, text)
    if order == "session first":
        new.session.load_state_dict(session)
    new.model.load_state_dict(model)
    new.optimizer.load_state_dict(optimizer)
    if order == "session last":
        new.session.load_state_dict(session)
    return new


@given(
    st.sampled_from(list(RULES)),
    st.sampled_from(list(STRUCTURES)),
    st.sampled_from(list(PLACES)),
    st.sampled_from(list(OPTIMIZERS)),
    st.sampled_from([0, BEGIN]),
    st.integers(0, STEPS - 1),
    st.sampled_from(["session first", "session last", "model before attaching"]),
    st.booleans(),
)
@settings(deadline=None, max_examples=80)
def test_a_run_resumes_bit_for_bit(rule, structure, place, make, begin, at, order, evaluated):
    place, make = PLACES[place], OPTIMIZERS[make]
    text = recipe(place, RULES[rule], structure, begin)
    batches = data(place)
    whole = Training(place, make, text).run(batches)
    first = Training(place, make, text).run(batches[:at])
    if evaluated:
        first.model.eval()
        first.model(batches[0][0])
    again = resumed(place, make, text, first.saved(), order).run(batches[at:])
    assert again.same_as(whole)


@pytest.mark.parametrize("order", ["session first", "session last", "model before attaching"])
@pytest.mark.parametrize("at", [1, 6, 16])
def test_a_mask_that_loosens_resumes_too_and_says_nothing(at, order, caplog):
    # attaching hides all but 1 of 4, while 2 of 4 are frozen at the end
    place, make = PLACES["linear"], OPTIMIZERS["adamw"]
    more = "structure: [1:4, 2:4],"
    text = recipe(place, RULES["ste"], "none", 0, pattern="2:4", more=more)
    batches = data(place)
    whole = Training(place, make, text).run(batches)
    first = Training(place, make, text).run(batches[:at])
    with caplog.at_level(logging.WARNING, "prunus"):
        again = resumed(place, make, text, first.saved(), order).run(batches[at:])
    assert again.same_as(whole)
    assert not caplog.records


@pytest.mark.parametrize("at", [1, 7, 17])
def test_evaluating_between_steps_changes_nothing(at):
    place, make = PLACES["third"], OPTIMIZERS["sgd"]
    text = recipe(place, RULES["mdgf-linear-scaled"], "stepwise")
    batches = data(place)
    whole = Training(place, make, text).run(batches)
    other = Training(place, make, text).run(batches[:at])
    other.model.eval()
    other.model(batches[0][0])
    other.model.train()
    assert other.run(batches[at:]).same_as(whole)


def test_a_state_resumed_at_the_end_closes_as_the_uninterrupted_run():
    place, make = PLACES["conv"], OPTIMIZERS["adamw"]
    text = recipe(place, RULES["mdgf-cosine-ste"], "none", end=END + 100)
    whole = Training(place, make, text).run(data(place))
    new = resumed(place, make, text, whole.saved(), "session first")
    whole.session.close()
    new.session.close()
    assert new.same_as(whole)
    assert new.session.sparsity == 0.75


def test_the_state_holds_the_dense_weights_only_while_they_are_hidden():
    place, make = PLACES["linear"], OPTIMIZERS["sgd"]
    text = recipe(place, RULES["sr_ste"], "none")
    batches = data(place)
    training, seen = Training(place, make, text), []
    for at, size in ((0, 0), (BEGIN, 1), (END - 1, 1), (END, 0)):
        training.run(batches[training.session.step : at])
        dense = training.session.state_dict()["runs"][0]["dense"]
        assert len(dense) == size
        seen += [w.numel() for w in dense.values()]
    assert seen == [256, 256]


def test_a_run_over_several_layers_resumes_in_every_order():
    place, make = PLACES["third"]._replace(layers="attn.*"), OPTIMIZERS["adamw"]
    text = recipe(place, RULES["mdgf-linear-scaled"], "none")
    batches = data(place)
    whole = Training(place, make, text).run(batches)
    first = Training(place, make, text).run(batches[:8])
    first.model.eval()
    first.model(batches[0][0])
    for order in ("session first", "session last", "model before attaching"):
        again = resumed(place, make, text, first.saved(), order)
        assert len(again.session.runs[0].layers) == 2
        assert again.run(batches[8:]).same_as(whole)
