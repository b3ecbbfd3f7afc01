"""The recipe entry `semi_sparse`: when layers are 2:4, what is trained, resuming, what is left."""

import itertools

import pytest
import torch
from torch import nn

import prunus
from prunus.execution.training import (
    SemiSparse,
    SemiSparseActivationLinear,
    SemiSparseLinear,
    swap_linear_with_semi_sparse_linear,
    tile_mask,
)
from prunus.modifiers import SemiSparseTraining
from prunus.modifiers.timing import Interval

STEPS = 12
LAYERS = ("0", "2")


def net():
    torch.manual_seed(1)
    parts = (nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3))
    return nn.Sequential(*parts).double()


def batches(number=STEPS):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(8, 8, generator=generator, dtype=torch.float64) for _ in range(number)]


def adam(model):
    return torch.optim.Adam(model.parameters(), 0.05)


def attached(entry, optimizer=adam, model=None, **arguments):
    model = net() if model is None else model
    optimizer = optimizer(model)
    recipe = f"modifiers: [semi_sparse: {{{entry}}}]"
    arguments = {"steps_per_epoch": 3, "epochs": 4, **arguments}
    return model, optimizer, prunus.attach(model, optimizer, recipe, **arguments)


def step(model, optimizer, *inputs):
    optimizer.zero_grad()
    for x in inputs:
        (model(x).square().mean() / len(inputs)).backward()
    optimizer.step()


def trained(entry, number=STEPS, **arguments):
    model, optimizer, session = attached(entry, **arguments)
    with session:
        for x in batches(number):
            step(model, optimizer, x)
    return model, session


def equal(left, right):
    states = left.state_dict(), right.state_dict()
    return all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))


def events(session, kind="flips"):
    return [event for event in session.recorder.events if event["event"] == kind]


def by_hand(begin, end, refresh=1, rule="exact", decay=0.0, masked=False):
    """The same training with the masks written out: (model, the masks of each step)."""
    model, masks, history = net(), {}, []
    optimizer = adam(model)
    for done, x in enumerate(batches()):
        chosen = [model[0], model[2]] if begin <= done < end else []
        if chosen and (done - begin) % refresh == 0:
            masks = {m: tile_mask(m.weight.detach(), rule).double() for m in chosen}
        history.append([masks[m] for m in chosen])
        dense = {m: m.weight.detach().clone() for m in chosen}
        for m in chosen:
            m.weight.data.mul_(masks[m])  # straight through: the gradient at the masked weight
        optimizer.zero_grad()
        model(x).square().mean().backward()
        for m in chosen:
            m.weight.data.copy_(dense[m])
            m.weight.grad += decay * (1 - masks[m]) * dense[m]
            m.weight.grad *= masks[m] if masked else 1
        optimizer.step()
    return model, history


@pytest.mark.parametrize("rule", ["exact", "greedy"])
@pytest.mark.parametrize(
    ("entry", "arguments"),
    [
        ("window: {to: 12step}", {"begin": 0, "end": 12}),
        ("window: {from: 2step, to: 75%}", {"begin": 2, "end": 9}),
        ("refresh: 3, window: {from: 1ep}", {"begin": 3, "end": 12, "refresh": 3}),
        ("refresh: 0", {"begin": 0, "end": 12, "refresh": 99}),
        ("gradient: masked", {"begin": 0, "end": 12, "masked": True}),
        ("gradient: sr_ste, decay: 0.1", {"begin": 0, "end": 12, "decay": 0.1}),
    ],
)
def test_training_is_that_by_hand(entry, arguments, rule):
    model, _ = trained(f"{entry}, rule: {rule}")
    expected, _ = by_hand(rule=rule, **arguments)
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_layers_are_sparse_within_the_window_and_dense_before_and_after_it():
    model, optimizer, session = attached("window: {from: 2step, to: 5step}")
    with session:
        for done, x in enumerate(batches()):
            sparse = [isinstance(m, SemiSparseLinear) for m in model]
            assert sparse == [2 <= done < 5, False, 2 <= done < 5, False, False]
            step(model, optimizer, x)
    assert all(type(model[i]) is nn.Linear for i in (0, 2, 4))
    assert session.sparsity == 0.0


def test_the_first_forward_pass_is_sparse_already():
    model, _, session = attached("layers: [re:0]")
    assert type(model[0]) is SemiSparseLinear
    assert type(model[2]) is nn.Linear
    session.close(finish=False)
    assert type(model[0]) is nn.Linear


def test_activations_can_be_sparse_instead():
    model, optimizer, session = attached("kind: activation, layers: ['*'], window: {to: 50%}")
    twin = net()
    swap_linear_with_semi_sparse_linear(twin, {"*": SemiSparseActivationLinear})
    other = adam(twin)
    with session:
        for x in batches(6):
            step(model, optimizer, x)
            step(twin, other, x)
    assert equal(model, twin)
    assert type(model[0]) is nn.Linear
    assert events(session) == []


@pytest.mark.parametrize("gradient", ["ste", "sr_ste", "masked"])
def test_the_entry_trains_as_swapped_layers_do_by_themselves(gradient):
    model, _ = trained(f"gradient: {gradient}, decay: 0.2, refresh: 2")
    twin = net()
    options = SemiSparse(gradient=gradient, decay=0.2, refresh=2)
    swap_linear_with_semi_sparse_linear(twin, dict.fromkeys(LAYERS, options))
    optimizer = adam(twin)
    for x in batches():
        step(twin, optimizer, x)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_decay_counts_once_a_step_with_accumulated_gradients():
    model, optimizer, session = attached("gradient: sr_ste, decay: 0.2")
    twin, other, whole = attached("gradient: sr_ste, decay: 0.2")
    for x in batches():
        step(model, optimizer, *x.split(2))
        step(twin, other, x)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    for s in (session, whole):
        s.close()


def test_decay_is_scaled_as_the_gradients_of_a_fused_optimizer_are():
    def fused(model):
        return torch.optim.SGD(model.parameters(), 0.05, fused=True)

    def plain(model):
        return torch.optim.SGD(model.parameters(), 0.05)

    models = []
    for optimizer in (fused, plain):
        model, optimizer, session = attached("gradient: sr_ste, decay: 0.2", optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        with session:
            for x in batches():
                optimizer.zero_grad()
                scaler.scale(model(x).square().mean()).backward()
                scaler.step(optimizer)
                scaler.update()
        assert session.step == STEPS
        models.append(model)
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p, q)


def test_a_skipped_step_leaves_masks_as_they_are():
    model, optimizer, session = attached("layers: ['0']")
    scaler = torch.amp.GradScaler("cpu")
    before = model[0].tile_mask
    with session:
        x = batches(1)[0] * torch.inf
        scaler.scale(model(x).square().mean()).backward()
        scaler.step(optimizer)
        assert session.step == 0
        assert model[0].tile_mask is before


@pytest.mark.parametrize("end", ["", "window: {to: 6step}, "])
def test_kept_masks_leave_a_model_that_is_2_of_4_both_ways_and_computes_what_was_trained(end):
    model, optimizer, session = attached(f"{end}keep: true")
    last = batches()[-1]
    with session:
        for i, x in enumerate(batches()):
            step(model, optimizer, x)
            if i + 1 >= 6 and end:
                assert type(model[0]) is nn.Linear
                assert session.sparsity == 0.5
        seen = model(last)
    assert torch.equal(model(last), seen)
    for name in LAYERS:
        weight = model[int(name)].weight
        assert torch.equal(session.masks[f"{name}.weight"], weight != 0)
        for w in (weight, weight.T):
            assert (w.reshape(-1, 4).count_nonzero(1) == 2).all()
    assert session.sparsity == 0.5


def test_the_momentum_of_what_kept_masks_hide_is_zero():
    model, optimizer, session = attached("keep: true")
    with session:
        for x in batches():
            step(model, optimizer, x)
    for name in LAYERS:
        weight = model[int(name)].weight
        momentum = optimizer.state[weight]["exp_avg"]
        assert (momentum[weight == 0] == 0).all()


@pytest.mark.parametrize("weights_first", [True, False])
@pytest.mark.parametrize(
    ("entry", "at"),
    [
        *(("refresh: 3, window: {from: 1step, to: 9step}", at) for at in (0, 1, 2, 3, 5, 8, 9, 10)),
        *(("keep: true, window: {to: 6step}", at) for at in (3, 6, 8)),
        ("gradient: sr_ste, decay: 0.1, refresh: 5", 7),
        ("kind: activation", 4),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(entry, at, weights_first, tmp_path):
    whole, session = trained(entry)
    model, optimizer, part = attached(entry)
    for x in batches()[:at]:
        step(model, optimizer, x)
    torch.save([p.state_dict() for p in (model, optimizer, part)], tmp_path / "state.pt")
    part.close(finish=False)

    parts = attached(entry)
    states = torch.load(tmp_path / "state.pt", weights_only=True)
    order = range(3) if weights_first else reversed(range(3))
    for i in order:
        parts[i].load_state_dict(states[i])
    model, optimizer, resumed = parts
    with resumed:
        for x in batches()[at:]:
            step(model, optimizer, x)
    assert equal(model, whole)
    assert [type(m) for m in model] == [type(m) for m in whole]
    rates = [{e["step"]: e["layers"] for e in events(s)} for s in (session, resumed)]
    assert rates[1] == {s: r for s, r in rates[0].items() if s > at}
    assert resumed.sparsity == session.sparsity


def test_a_session_goes_back_to_an_earlier_state():
    entry = "window: {from: 2step, to: 5step}"
    model, optimizer, session = attached(entry)
    states = []
    for x in batches():
        states.append(session.state_dict())
        step(model, optimizer, x)
    for at in (3, 0, 4, 8):
        session.load_state_dict(states[at])
        assert isinstance(model[0], SemiSparseLinear) == (2 <= at < 5)
    session.close()
    assert type(model[0]) is nn.Linear


def test_flip_rates_are_recorded_once_an_epoch_and_are_those_of_the_masks():
    _, session = trained("window: {to: 9step}")
    _, history = by_hand(0, 10)
    recorded = events(session)
    assert [event["step"] for event in recorded] == [3, 6, 9]
    for event in recorded:
        now, before = history[event["step"]], history[event["step"] - 1]
        rates = {
            n: (a != b).double().mean().item() for n, a, b in zip(LAYERS, now, before, strict=True)
        }
        assert event["layers"] == pytest.approx(rates)
        assert event["flip_rate"] == pytest.approx((128 * rates["0"] + 192 * rates["2"]) / 320)
    assert any(event["flip_rate"] > 0 for event in recorded)


def test_an_error_in_the_loop_leaves_dense_layers_and_unmasked_weights():
    model, optimizer, session = attached("keep: true")
    with pytest.raises(ZeroDivisionError), session:
        step(model, optimizer, batches(1)[0])
        assert type(model[0]) is SemiSparseLinear
        raise ZeroDivisionError
    assert type(model[0]) is nn.Linear
    assert (model[0].weight != 0).all()


@pytest.mark.parametrize("refresh", [1, 2])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model_trains_as_an_eager_one(refresh):
    torch._dynamo.reset()
    entry = f"refresh: {refresh}, window: {{from: 2step, to: 8step}}"
    eager, _ = trained(entry)
    inner = net()
    model, _ = trained(entry, model=torch.compile(inner, backend="aot_eager"))
    assert type(model._orig_mod[0]) is nn.Linear
    for p, q in zip(inner.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_pruning_after_the_window_prunes_what_was_trained():
    recipe = """
modifiers:
  - semi_sparse: {window: {to: 6step}}
  - prune: {pattern: 2:4, window: {from: 6step}}
"""
    model = net()
    optimizer = adam(model)
    with prunus.attach(model, optimizer, recipe) as session:
        for done, x in enumerate(batches()):
            assert isinstance(model[0], SemiSparseLinear) == (done < 6)
            step(model, optimizer, x)
    assert session.sparsity == 0.5
    assert (model[2].weight.reshape(-1, 4).count_nonzero(1) == 2).all()


def test_a_finished_model_is_pruned_without_it():
    recipe = "modifiers: [semi_sparse: {keep: true}, prune: {sparsity: 0.5}]"
    assert prunus.prune(net(), recipe).sparsity == pytest.approx(0.5, abs=0.01)


def test_the_entry_is_read_and_written():
    text = """
modifiers:
- semi_sparse:
    rule: greedy
    gradient: sr_ste
    decay: 1.0e-05
    refresh: 40
    layers: ['0']
    window:
      to: 83%
    keep: true
"""
    recipe = prunus.Recipe.load(text)
    (entry,) = recipe.modifiers
    assert entry == SemiSparseTraining(
        rule="greedy",
        gradient="sr_ste",
        decay=1e-5,
        refresh=40,
        layers=("0",),
        window=Interval(to="83%"),
        keep=True,
    )
    assert prunus.Recipe.load(recipe.to_yaml()) == recipe


def test_what_will_happen_is_planned():
    plans = [
        attached(entry)[2].runs[0].timetable()
        for entry in ("window: {from: 1ep, to: 3ep}", "keep: true, gradient: masked")
    ]
    assert plans == [
        [(3, "2:4 weights in 2 layers (exact, ste)"), (9, "dense again")],
        [(0, "2:4 weights in 2 layers (exact, masked)"), (12, "the last masks kept")],
    ]


def said(entry, caplog):
    caplog.clear()
    attached(entry)[2].close(finish=False)
    return caplog.text


def test_dense_weights_that_were_never_trained_as_such_are_warned_of(caplog):
    lines = "training ends with 2:4 weights"
    assert lines in said("layers: ['0']", caplog)
    assert lines in said("window: {to: 4ep}", caplog)
    for entry in ("window: {to: 83%}", "keep: true", "kind: activation"):
        assert lines not in said(entry, caplog)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)
        self.fc = nn.Linear(8, 8)
        self.narrow = nn.Linear(8, 6)
        self.head = nn.Linear(6, 4)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("layers: [fc2]", "layer pattern 'fc2' matches nothing; nearest: fc"),
        ("layers: [conv, fc]", "layers: conv is a Conv2d; only whole Linear layers"),
        ("layers: [fc, narrow]", r"narrow \(Linear\) has out_features=6, no multiple of 4"),
        ("window: {from: 1ep, to: 3step}, layers: [fc]", "window is empty: .* with step 3"),
        ("window: {every: 1ep}", "window.every: unknown key 'every'"),
        ("kind: activation, keep: true", "keep=true is about the masks of weights"),
        ("kind: weights", "expected 'weight' or 'activation', not 'weights'"),
        ("gradient: sr_ste, kind: activation", "activations are none"),
        ("refesh: 2", "unknown key 'refesh'; did you mean 'refresh'"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_changes(entry, message):
    model = Mixed()
    with pytest.raises(ValueError, match=message):
        attached(entry, model=model)
    assert type(model.fc) is nn.Linear


def test_by_default_every_linear_but_the_head_is_taken():
    model = Mixed()
    _, _, session = attached("exclude: [narrow]", model=model)
    kinds = itertools.starmap(lambda name, m: (name, type(m)), model.named_children())
    assert [name for name, kind in kinds if kind is SemiSparseLinear] == ["fc"]
    session.close()


def test_weights_that_the_optimizer_does_not_hold_are_refused():
    model = net()
    with pytest.raises(ValueError, match=r"the optimizer does not hold 0\.weight"):
        attached("layers: ['0']", lambda m: adam(m[2]), model=model)
    assert type(model[0]) is nn.Linear
