"""N:M training at step boundaries: equal to autograd functions, and strictly N:M at the end."""

import itertools
import logging
import math

import pytest
import torch
from torch import nn

import prunus
from prunus.modifiers import Run
from prunus.modifiers.nm.maskings import DECAYS, MDGF, SRSTE

from tests.oracles.nm import (
    OPTIMIZERS,
    PLACES,
    RULES,
    STRUCTURES,
    Function,
    data,
    is_strict,
    keep_of,
    linear,
    model_of,
    oracle,
    recipe,
    step,
)

LINEAR = PLACES["linear"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("rule", RULES)
def test_every_combination_equals_its_autograd_function_and_exports_n_of_m(
    rule, structure, place, tmp_path
):
    # the optimizers take turns, so that each meets every two of the others
    turn = sum(map(list.index, map(list, (RULES, STRUCTURES, PLACES)), (rule, structure, place)))
    make = list(OPTIMIZERS.values())[turn % len(OPTIMIZERS)]
    rule, place = RULES[rule], PLACES[place]
    expected, mask = oracle(place, rule, structure, make)
    model = model_of(place)
    optimizer = make(model.parameters())
    weight = model.get_parameter(place.parameter)
    with prunus.attach(model, optimizer, recipe(place, rule, structure)) as session:
        for (x, y), used in zip(data(place), expected, strict=False):
            torch.testing.assert_close(weight.detach(), used, rtol=1e-11, atol=1e-12)
            step(model, optimizer, x, y)
    torch.testing.assert_close(weight.detach(), expected[-1], rtol=1e-11, atol=1e-12)
    assert torch.equal(session.masks[place.parameter], mask)
    assert is_strict(place, weight)
    assert session.sparsity == 0.75 if place.layers == "2" else session.sparsity == 0.25
    prunus.save(model, tmp_path / "m.safetensors", pruning=session)
    again = prunus.load(tmp_path / "m.safetensors", model_of(place))
    assert torch.equal(again.state_dict[place.parameter], weight)
    assert torch.equal(again.masks[place.parameter], mask)


def attached(rule, make=OPTIMIZERS["sgd"], structure="none", begin=0, end=100, dtype=torch.float64):
    model = model_of(LINEAR).to(dtype)
    optimizer = make(model.parameters())
    text = recipe(LINEAR, RULES[rule], structure, begin, end)
    return model, optimizer, prunus.attach(model, optimizer, text)


def dense_of(session):
    return session.state_dict()["runs"][0]["dense"]["2"]


# formulas


def test_sr_ste_without_a_gradient_decays_what_is_pruned_and_leaves_the_rest():
    model, rate, decay = model_of(LINEAR), 0.5, 0.01
    optimizer = torch.optim.SGD(model.parameters(), rate)
    before = model[2].weight.detach().clone()
    mask = keep_of(LINEAR, before, 1, 4)
    text = recipe(LINEAR, RULES["sr_ste"]._replace(masking="{name: sr_ste, decay: 0.01}"), "none")
    with prunus.attach(model, optimizer, text) as session:
        for t in range(15):
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()
            if 3 <= t + 1 < 15:
                expected = torch.where(mask, before, before * (1 - rate * decay) ** (t + 1 - 3))
                torch.testing.assert_close(dense_of(session), expected, rtol=1e-12, atol=0)
                assert torch.equal(model[2].weight, before * mask)
    assert torch.equal(model[2].weight, before * mask)


EVERY_DECAY = [MDGF(decay) for decay in DECAYS] + [
    MDGF(decay, rate) for decay in ("linear", "exponential") for rate in (1e-4, 0.1, 3.0)
]


@pytest.mark.parametrize("total", [1, 2, 7, 1000])
@pytest.mark.parametrize("masking", EVERY_DECAY, ids=str)
def test_beta_begins_at_one_never_rises_and_is_exactly_zero_at_the_end(masking, total):
    betas = [masking.beta(t, total) for t in range(total + 3)]
    assert betas[0] == 1
    assert betas[total:] == [0, 0, 0]
    assert all(a >= b for a, b in itertools.pairwise(betas))


def test_the_default_rates_fill_the_window():
    assert MDGF("linear").beta(25, 100) == 0.75
    assert MDGF("linear", 0.01).beta(25, 100) == 0.75
    assert MDGF("exponential").beta(50, 100) == pytest.approx(math.exp(-5.5))
    # published: 1e-4 a step, over about 109,500 steps
    steps = 350 * 313
    published, ours = MDGF("exponential", 1e-4), MDGF("exponential")
    assert published.beta(steps // 2, steps) == pytest.approx(
        ours.beta(steps // 2, steps), rel=0.03
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SRSTE(-1e-4), "decay=-0.0001 does not let pruned weights decay; use 0 or more"),
        (lambda: MDGF("linaer"), "unknown decay 'linaer'; did you mean 'linear'"),
        (lambda: MDGF("cosine", 0.1), "'rate' means nothing to decay 'cosine'"),
        (lambda: MDGF("linear", 0.0), "rate=0.0 is no rate of decay; use a number above 0"),
        (lambda: SRSTE(math.nan), "decay=nan does not let pruned weights decay"),
        (lambda: MDGF("linear", math.nan), "rate=nan is no rate of decay"),
        (lambda: MDGF("linear", math.inf), "rate=inf is no rate of decay"),
        (lambda: MDGF(gradient="scale"), "gradient='scale'; use 'scaled' or 'ste'"),
        (lambda: MDGF(eval="sfot"), "eval='sfot'; use 'hard' or 'soft'"),
    ],
)
def test_maskings_refuse_what_would_not_decay(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# writing to the weights from outside


def test_other_weights_loaded_between_steps_are_adopted_and_the_log_says_so(caplog):
    model, optimizer, session = attached("mdgf-linear-scaled")
    batches = data(LINEAR)
    for x, y in batches[:4]:
        step(model, optimizer, x, y)
    torch.manual_seed(9)
    model.load_state_dict(linear().double().state_dict())
    loaded = model[2].weight.detach().clone()
    for p in model.parameters():
        p.grad = None
    with caplog.at_level(logging.WARNING, "prunus"):
        optimizer.step()  # without gradients, so that it changes nothing
    assert torch.equal(dense_of(session), loaded)
    assert "the weights of 1 layers were written between two steps" in caplog.text


@pytest.mark.parametrize("rule", ["sr_ste", "mdgf-linear-scaled"])
def test_averaged_weights_may_be_swapped_in_and_back(rule, caplog):
    (model, optimizer, session), (plain, other, expected) = attached(rule), attached(rule)
    for x, y in data(LINEAR)[:8]:
        step(plain, other, x, y)
        step(model, optimizer, x, y)
        mine = {name: t.clone() for name, t in model.state_dict().items()}
        model.load_state_dict({name: 0.9 * t for name, t in mine.items()})
        model(x)
        model.load_state_dict(mine)
    assert torch.equal(dense_of(session), dense_of(expected))
    assert not caplog.records


@pytest.mark.parametrize("rule", ["sr_ste", "mdgf-linear-scaled"])
def test_a_session_that_gives_up_leaves_the_dense_weights_and_a_state_to_go_on_from(rule):
    whole = attached(rule)
    model, optimizer, session = attached(rule)
    batches = data(LINEAR)
    for x, y in batches:
        step(*whole[:2], x, y)
    with pytest.raises(ZeroDivisionError), session:
        for x, y in batches[:5]:
            step(model, optimizer, x, y)
        dense = dense_of(session)
        assert not torch.equal(model[2].weight, dense)
        raise ZeroDivisionError
    assert torch.equal(model[2].weight, dense)
    states = [part.state_dict() for part in (model, optimizer, session)]
    again = attached(rule)
    for part, state in zip(again, states, strict=True):
        part.load_state_dict(state)
    for x, y in batches[5:]:
        step(*again[:2], x, y)
    assert torch.equal(again[0][2].weight, whole[0][2].weight)


def test_a_session_that_cannot_begin_leaves_the_weights_as_they_were(monkeypatch):
    def fails(self):
        raise ValueError("no")

    monkeypatch.setattr(Run, "on_attach", fails)
    model = model_of(LINEAR)
    before = model[2].weight.detach().clone()
    text = "modifiers: [nm_training: {pattern: 1:4, masking: ste, layers: ['2']}, learning_rate: {to: 1}]"
    with pytest.raises(ValueError, match="no"):
        prunus.attach(
            model, OPTIMIZERS["sgd"](model.parameters()), text, steps_per_epoch=9, epochs=1
        )
    assert torch.equal(model[2].weight, before)


# optimizers, scalers and loops


@pytest.mark.parametrize("rule", ["sr_ste", "mdgf-linear-scaled"])
def test_a_step_that_gradscaler_skips_leaves_the_dense_weights_and_hides_them_again(rule):
    def fused(p):
        return torch.optim.AdamW(p, 1e-2, fused=True)

    model, optimizer, session = attached(rule, fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for i, (x, y) in enumerate(data(LINEAR)[:5]):
        before = dense_of(session), model[2].weight.detach().clone(), session.step
        loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss * float("inf") if i == 3 else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        same = torch.equal(dense_of(session), before[0])
        assert same == torch.equal(model[2].weight, before[1]) == (i == 3)
        assert session.step == before[2] + (i != 3)


@pytest.mark.parametrize("rule", ["sr_ste", "mdgf-linear-scaled", "mdgf-linear-ste"])
@pytest.mark.parametrize("fused", [False, True])
def test_gradscaler_changes_nothing_but_rounding(rule, fused):
    """A fused optimizer divides by the scale itself: SR-STE's term must be scaled before."""

    def make(p):
        return torch.optim.SGD(p, 0.5, fused=fused)

    (model, optimizer, session), (plain, other, expected) = (attached(rule, make) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for x, y in data(LINEAR)[:6]:
        step(plain, other, x, y)
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    torch.testing.assert_close(dense_of(session), dense_of(expected), rtol=1e-12, atol=1e-12)


def test_a_closure_that_computes_the_gradients_inside_the_step_is_the_same_training():
    """Lightning's way."""
    (model, optimizer, session), (plain, other, expected) = (attached("sr_ste") for _ in range(2))

    for x, y in data(LINEAR)[:6]:
        step(plain, other, x, y)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure=closure)
    assert torch.equal(dense_of(session), dense_of(expected))


def test_lbfgs_sees_hidden_weights_at_first_and_dense_ones_when_it_calls_again():
    def make(p):
        return torch.optim.LBFGS(p, max_iter=3)

    model, optimizer, session = attached("ste", make)
    (x, y), seen = data(LINEAR)[0], []

    def closure():
        optimizer.zero_grad()
        seen.append(float((model[2].weight == 0).double().mean()))
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    with session:
        optimizer.step(closure)
        assert seen == [0.75, 0, 0]
        assert session.step == 1
        assert is_strict(LINEAR, model[2].weight)


def test_accumulated_gradients_are_one_step():
    (model, optimizer, session), (plain, other, expected) = (attached("sr_ste") for _ in range(2))
    for x, y in data(LINEAR)[:6]:
        step(plain, other, x, y)
        for half in (slice(0, 3), slice(3, 6)):
            (nn.functional.cross_entropy(model(x[half]), y[half]) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(dense_of(session), dense_of(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", ["ste", "sr_ste", "mdgf-linear-scaled"])
def test_a_layer_without_a_gradient_keeps_its_dense_weight(rule):
    model, optimizer, session = attached(rule)
    before = dense_of(session)
    for _ in range(3):
        optimizer.step()
    assert torch.equal(dense_of(session), before)
    session.close()
    assert is_strict(LINEAR, model[2].weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rule", ["sr_ste", "mdgf-cosine-scaled"])
def test_narrow_weights_train_as_the_autograd_function_does(rule, dtype):
    def make(p):
        return torch.optim.SGD(p, 0.05)

    model, optimizer, session = attached(rule, make, dtype=dtype)
    plain = model_of(LINEAR).to(dtype)
    other, w = make(plain.parameters()), plain[2].weight
    for t in range(6):
        mask = keep_of(LINEAR, w, 1, 4)
        used = Function.apply(w, mask.to(dtype), RULES[rule].beta(t, 100), RULES[rule].kind)
        torch.testing.assert_close(model[2].weight, used, rtol=1e-2, atol=1e-2)
        g = torch.randn(used.shape, generator=torch.Generator().manual_seed(t)).to(dtype)
        model[2].weight.grad = g.clone()
        used.backward(g)
        for o in (optimizer, other):
            o.step()
            o.zero_grad()
        torch.testing.assert_close(dense_of(session), w.detach(), rtol=1e-2, atol=1e-2)
        with torch.no_grad():  # rounding must not choose other masks
            w.copy_(dense_of(session))
    session.close()
    assert is_strict(LINEAR, model[2].weight)


def test_weights_end_strictly_n_of_m_when_training_stops_early(caplog):
    model, optimizer, session = attached("mdgf-linear-scaled", end=1000)
    for x, y in data(LINEAR)[:5]:
        step(model, optimizer, x, y)
    assert not is_strict(LINEAR, model[2].weight)
    mask = keep_of(LINEAR, dense_of(session), 1, 4)
    session.close()
    assert torch.equal(model[2].weight != 0, mask)
    assert "closed at step 5 of 1000" in caplog.text


def test_an_empty_window_freezes_at_once():
    model, optimizer, session = attached("mdgf-linear-scaled", begin=2, end=2)
    strict = []
    for x, y in data(LINEAR)[:4]:
        step(model, optimizer, x, y)
        strict.append(is_strict(LINEAR, model[2].weight))
    assert strict == [False, True, True, True]
    session.close()


def test_a_session_that_has_not_begun_leaves_training_bit_for_bit():
    model, optimizer, _ = attached("sr_ste", begin=90)
    plain = model_of(LINEAR)
    other = OPTIMIZERS["sgd"](plain.parameters())
    for x, y in data(LINEAR):
        step(model, optimizer, x, y)
        step(plain, other, x, y)
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


def test_pruning_a_finished_model_by_such_a_recipe_prunes_it_once_by_magnitude():
    model = model_of(LINEAR)
    mask = keep_of(LINEAR, model[2].weight, 1, 4)
    result = prunus.prune(model, recipe(LINEAR, RULES["mdgf-linear-scaled"], "stepwise"))
    assert torch.equal(result.masks["2.weight"], mask)
    assert is_strict(LINEAR, model[2].weight)
