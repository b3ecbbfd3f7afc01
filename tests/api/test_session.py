"""Attaching: the loop stays the user's own."""

import collections
import copy
import gc
import logging

import pytest
import torch
from torch import nn

import prunus

from tests.helpers.training import train
from tests.oracles.pruning import small_cnn, small_mlp

AT_ONCE = "modifiers:\n  - prune: {sparsity: 0.75}\n"
GRADUAL = """
modifiers:
  - prune:
      sparsity: {from: 0.2, to: 0.8, curve: cubic}
      window: {from: 2step, to: 10step, every: 4step}
"""


def zeros(model, names=("0.weight", "2.weight")):
    parameters = [dict(model.named_parameters())[name] for name in names]
    return sum(int((p == 0).sum()) for p in parameters) / sum(p.numel() for p in parameters)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2),
    "adamw-fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, 1e-2, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_masks_hold_under_every_optimizer(make):
    model = small_mlp()
    optimizer = make(model.parameters())
    with prunus.attach(model, optimizer, AT_ONCE) as session:
        train(model, optimizer, 6)
        assert abs(zeros(model) - 0.75) < 2e-3
        assert session.step == 6
    assert all((model.get_parameter(n)[~m] == 0).all() for n, m in session.masks.items())


def test_attach_changes_neither_the_optimizer_nor_the_keys_of_the_model():
    model = small_mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    keys, step, kind = list(model.state_dict()), optimizer.step, type(optimizer)
    with prunus.attach(model, optimizer, AT_ONCE):
        train(model, optimizer, 2)
    assert list(model.state_dict()) == keys
    assert optimizer.step == step
    assert type(optimizer) is kind


def test_pruning_happens_after_a_step_and_never_between_backward_and_step():
    model = small_mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    session = prunus.attach(model, optimizer, AT_ONCE)
    model(torch.randn(4, 8)).sum().backward()
    before = [p.clone() for p in model.parameters()]
    grads = [p.grad.clone() for p in model.parameters()]
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    optimizer.step()
    assert abs(zeros(model) - 0.75) < 2e-3
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    session.close()


def test_gradual_pruning_follows_its_schedule():
    model = small_mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    seen = []
    with prunus.attach(model, optimizer, GRADUAL):
        for _ in range(11):
            train(model, optimizer, 1)
            seen.append(round(zeros(model), 2))
    assert seen == [0, 0.2, 0.2, 0.2, 0.2, 0.73, 0.73, 0.73, 0.73, 0.8, 0.8]


def test_a_session_with_nothing_to_do_leaves_training_bit_for_bit():
    def run(attached):
        torch.manual_seed(0)
        model = small_cnn()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        late = "modifiers:\n  - prune: {sparsity: 0.5, window: {from: 100step}}\n"
        session = prunus.attach(model, optimizer, late) if attached else None
        for _ in range(4):
            model(torch.randn(4, 3, 8, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        if session:
            session.close(finish=False)
        return model.state_dict()

    plain, attached = run(False), run(True)
    assert all(torch.equal(plain[name], attached[name]) for name in plain)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_gradscaler_skips_does_not_count(fused):
    model = small_mlp()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    session = prunus.attach(
        model, optimizer, "modifiers:\n  - prune: {sparsity: 0.5, window: {from: 2step}}\n"
    )
    counts = []
    for i in range(4):
        loss = model(torch.randn(4, 8)).square().mean()
        loss = loss * float("inf") if i == 1 else loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        counts.append((session.step, zeros(model) > 0))
    session.close()
    assert counts == [(1, False), (1, False), (2, True), (3, True)]


@pytest.mark.parametrize("masking", ["sr_ste", "{name: mdgf, decay: exponential, gradient: ste}"])
def test_a_step_that_a_fused_optimizer_skips_leaves_the_masked_weights_in_place(masking):
    """Before the step the dense weights are put into the parameters, and no step follows."""
    model, x = small_mlp(), torch.randn(4, 8)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    recipe = (
        f"modifiers: [nm_training: {{pattern: 2:4, masking: {masking}, window: {{to: 9step}}}}]"
    )
    with prunus.attach(model, optimizer, recipe) as session:
        for skipped in (False, False, True, True, False):
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            scaler.scale(model(x).square().mean() * (torch.inf if skipped else 1)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            for name in session.masks:
                assert torch.equal(model.get_parameter(name), before[name]) == skipped
            assert session.step == 2 if skipped else session.step > 0
        assert session.step == 3


def test_gradient_accumulation_counts_optimizer_steps():
    model = small_mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recipe = "modifiers:\n  - prune: {sparsity: 0.5, window: {from: 1ep}}\n"
    with prunus.attach(
        model, optimizer, recipe, steps_per_epoch=6, epochs=2, gradient_accumulation_steps=3
    ) as session:
        for i in range(1, 7):
            model(torch.randn(4, 8)).sum().backward()
            if i % 3 == 0:
                optimizer.step()
                optimizer.zero_grad()
            assert (zeros(model) > 0) == (i == 6)
        assert session.step == 2


def test_a_learning_rate_scheduler_of_the_loop_goes_on_working():
    model = small_mlp()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    with prunus.attach(model, optimizer, AT_ONCE):
        for _ in range(3):
            train(model, optimizer, 1)
            scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.125


def test_weights_may_lie_in_several_parameter_groups():
    model = small_mlp()
    groups = [{"params": [p], "lr": 0.1 / (i + 1)} for i, p in enumerate(model.parameters())]
    optimizer = torch.optim.SGD(groups)
    with prunus.attach(model, optimizer, AT_ONCE):
        train(model, optimizer, 3)
    assert abs(zeros(model) - 0.75) < 2e-3


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization as people write it: the model runs again inside the step."""

    def __init__(self, params, base, rho=0.05):
        super().__init__(params, {"rho": rho})
        self.base = base

    def step(self, closure):
        moved = []
        for group in self.param_groups:
            for p in group["params"]:
                e = p.grad * group["rho"]
                p.data.add_(e)
                moved.append((p, e))
        closure()
        for p, e in moved:
            p.data.sub_(e)
        self.base.step()


def test_an_optimizer_that_runs_the_model_inside_its_step_ends_with_zeros():
    model = small_mlp()
    base = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    optimizer = SAM(model.parameters(), base)

    def closure():
        optimizer.zero_grad()
        base.zero_grad()
        loss = model(torch.randn(4, 8)).square().mean()
        loss.backward()
        return loss

    with prunus.attach(model, optimizer, AT_ONCE) as session:
        for _ in range(3):
            closure()
            optimizer.step(closure)
        assert session.step == 3
    assert abs(zeros(model) - 0.75) < 2e-3


def test_lbfgs_counts_one_step_however_often_it_calls_its_closure():
    model = small_mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
    x, calls = torch.randn(4, 8), []

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    with prunus.attach(model, optimizer, AT_ONCE) as session:
        optimizer.step(closure)
        assert session.step == 1
        assert len(calls) > 1
    assert abs(zeros(model) - 0.75) < 2e-3


def test_an_optimizer_that_wraps_another_counts_its_first_step_and_masks_its_last_word():
    class Lookahead(torch.optim.Optimizer):
        """As timm has it: no `Optimizer.__init__`, and the weights change after the inner step."""

        def __init__(self, base):
            self._optimizer_step_pre_hooks = collections.OrderedDict()
            self._optimizer_step_post_hooks = collections.OrderedDict()
            self.base, self.param_groups, self.state = base, base.param_groups, {}
            self.slow = [p.detach().clone() for p in self.param_groups[0]["params"]]

        @torch.no_grad()
        def step(self, closure=None):
            self.base.step(closure)
            for p, slow in zip(self.param_groups[0]["params"], self.slow, strict=True):
                p.copy_(slow.lerp_(p, 0.5))

    model = small_mlp()
    optimizer = Lookahead(torch.optim.SGD(model.parameters(), 0.1))
    with prunus.attach(model, optimizer, AT_ONCE) as session:
        for i in range(3):
            model.zero_grad()
            model(torch.randn(4, 8)).square().mean().backward()
            optimizer.step()
            assert session.step == i + 1
            assert abs(zeros(model) - 0.75) < 2e-3


def test_a_compiled_step_prunes_as_an_eager_one():
    def run(compiled):
        torch.manual_seed(0)
        model = small_mlp()
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        with prunus.attach(model, optimizer, GRADUAL):

            def step():
                optimizer.step()

            step = torch.compile(step, backend="eager") if compiled else step
            for _ in range(11):
                model(torch.randn(4, 8)).square().mean().backward()
                step()
                optimizer.zero_grad()
        return model

    plain, compiled = run(False), run(True)
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a, b)  # older compilers reorder the update's arithmetic
        assert torch.equal(a == 0, b == 0)


def test_tied_weights_are_one_entry():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 2))
    model[2].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with prunus.attach(model, optimizer, AT_ONCE) as session:
        train(model, optimizer, 2)
    assert list(session.masks) == ["0.weight"]
    assert (model[2].weight == 0).sum() == 48


def test_parameters_that_share_memory_are_one_entry():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 2))
    model[2].weight = nn.Parameter(model[0].weight.data)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with prunus.attach(model, optimizer, AT_ONCE) as session:
        train(model, optimizer, 2)
    assert list(session.masks) == ["0.weight"]
    assert (model[2].weight == 0).sum() == 48


def test_a_head_tied_to_its_embedding_resumes_and_projects():
    def build():
        model = nn.ModuleDict({"embed": nn.Embedding(8, 8), "head": nn.Linear(8, 8, bias=False)})
        model["head"].weight = model["embed"].weight
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        recipe = "modifiers:\n  - prune: {sparsity: 0.75, layers: [head]}\n"
        return model, optimizer, prunus.attach(model, optimizer, recipe)

    model, optimizer, session = build()
    model["head"](model["embed"](torch.arange(8))).sum().backward()
    optimizer.step()
    other, _, resumed = build()
    resumed.load_state_dict(session.state_dict())
    resumed.project(other)
    assert int((other["embed"].weight == 0).sum()) == 48


def test_weights_may_move_in_memory_between_pruning_steps():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recipe = """
modifiers:
  - prune: {sparsity: 0.5, layers: ["0"]}
  - prune: {sparsity: 0.75, layers: ["1"], window: {from: 2step}}
"""
    with prunus.attach(model, optimizer, recipe) as session:
        train(model, optimizer, 1)
        first, second = model[0].weight.data, model[1].weight.data
        model[0].weight.data = first.clone()
        model[1].weight.data = first.copy_(second)  # an allocator may give out the same address
        train(model, optimizer, 2)
    assert list(session.masks) == ["0.weight", "1.weight"]
    assert zeros(model, ["0.weight"]) == 0.5
    assert zeros(model, ["1.weight"]) == 0.75


def test_channels_last_convolutions_keep_their_strides():
    model = small_cnn().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    strides = model[5].weight.stride()
    with prunus.attach(model, optimizer, AT_ONCE) as session:
        for _ in range(2):
            x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
            model(x).square().mean().backward()
            optimizer.step()
        assert session.masks["5.weight"].stride() == strides
    assert model[5].weight.stride() == strides
    assert (model[5].weight[~session.masks["5.weight"]] == 0).all()


def test_bfloat16_parameters_are_pruned_and_stay_bfloat16():
    model = small_mlp(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    with prunus.attach(model, optimizer, AT_ONCE):
        train(model, optimizer, 2, [torch.randn(4, 8, dtype=torch.bfloat16)] * 2)
    assert model[0].weight.dtype == torch.bfloat16
    assert abs(zeros(model) - 0.75) < 2e-3


def test_weights_without_gradient_and_frozen_weights_are_pruned_all_the_same():
    model = small_mlp()
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with prunus.attach(model, optimizer, AT_ONCE):
        model[2:](torch.randn(4, 32)).sum().backward()
        optimizer.step()
    assert model[0].weight.grad is None
    assert abs(zeros(model) - 0.75) < 2e-3


def test_a_compiled_model_has_clean_names_and_keeps_its_masks():
    model = small_mlp()
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(compiled.parameters(), 0.1)
    with prunus.attach(compiled, optimizer, AT_ONCE) as session:
        train(compiled, optimizer, 3)
    assert sorted(session.masks) == ["0.weight", "2.weight"]
    assert abs(zeros(model) - 0.75) < 2e-3


def test_project_masks_an_ema_copy():
    model = small_mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ema = torch.optim.swa_utils.AveragedModel(model)
    with prunus.attach(model, optimizer, GRADUAL) as session:
        for _ in range(12):
            train(model, optimizer, 1)
            ema.update_parameters(model)
        assert zeros(ema.module) < 0.5
        session.project(ema)
    assert zeros(ema.module) >= 0.8 - 2e-3


def test_projecting_onto_another_model_changes_nothing():
    model, other = small_mlp(), nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 17))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with prunus.attach(model, optimizer, AT_ONCE) as session:
        train(model, optimizer, 1)
        with pytest.raises(ValueError, match=r"'2.weight' is \(17, 32\) there and \(16, 32\) here"):
            session.project(other)
    assert zeros(other) == 0


def test_masks_survive_the_garbage_collector():
    model = small_mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    prunus.attach(model, optimizer, AT_ONCE)  # not kept in a variable
    train(model, optimizer, 1)
    gc.collect()
    train(model, optimizer, 3)
    assert abs(zeros(model) - 0.75) < 2e-3


@pytest.mark.parametrize("make", [OPTIMIZERS["sgd"], OPTIMIZERS["adamw"]])
def test_the_momentum_of_pruned_weights_is_zeroed_with_them(make):
    model = small_mlp()
    optimizer = make(model.parameters())
    late = "modifiers:\n  - prune: {sparsity: 0.5, window: {from: 3step}}\n"
    with prunus.attach(model, optimizer, late) as session:
        train(model, optimizer, 3)
        dropped = ~session.masks["0.weight"]
        buffers = [
            v
            for v in optimizer.state[model[0].weight].values()
            if torch.is_tensor(v) and v.shape == dropped.shape
        ]
        assert buffers
        assert all((b[dropped] == 0).all() and (b[~dropped] != 0).any() for b in buffers)


def test_consecutive_modifiers_on_the_same_weights_inherit_their_masks():
    model = small_mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recipe = """
modifiers:
  - prune: {sparsity: 0.5, window: {from: 1step}}
  - prune: {sparsity: {from: 0.5, to: 0.9}, window: {from: 4step, to: 8step, every: 2step}}
"""
    with prunus.attach(model, optimizer, recipe) as session:
        train(model, optimizer, 3)
        first = {name: mask.clone() for name, mask in session.masks.items()}
        train(model, optimizer, 7)
        assert all(not session.masks[name][~mask].any() for name, mask in first.items())
    assert abs(zeros(model) - 0.9) < 2e-3


def test_a_window_that_ends_with_training_reaches_its_target():
    model = small_mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recipe = "modifiers:\n  - prune: {sparsity: {from: 0.1, to: 0.9, curve: cubic}}\n"
    with prunus.attach(model, optimizer, recipe, steps_per_epoch=3, epochs=3):
        train(model, optimizer, 8)  # a loader that dropped its last batch
    assert abs(zeros(model) - 0.9) < 2e-3


def test_a_window_that_ends_after_training_is_said_when_attaching(caplog):
    model = small_mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recipe = "modifiers:\n  - prune: {sparsity: {from: 0.1, to: 0.5}, window: {to: 3ep}}\n"
    prunus.attach(model, optimizer, recipe, steps_per_epoch=5, epochs=3).close(finish=False)
    assert not caplog.text
    prunus.attach(model, optimizer, recipe, steps_per_epoch=5, epochs=2)
    assert "last pruned after step 15, but training ends after step 10" in caplog.text


def test_two_open_sessions_of_an_optimizer_do_not_prune_the_same_layer():
    model = small_mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    first = prunus.attach(model, optimizer, "modifiers: [prune: {sparsity: 0.5, layers: ['0']}]")
    again = "modifiers: [prune: {sparsity: 0.5, layers: ['0', '2']}]"
    with pytest.raises(ValueError, match="prunes 0 already .* close that one first"):
        prunus.attach(model, optimizer, again)
    assert zeros(model) == 0
    prunus.attach(model, optimizer, "modifiers: [prune: {sparsity: 0.5, layers: ['2']}]")
    first.close()
    prunus.attach(model, optimizer, "modifiers: [prune: {sparsity: 0.6, layers: ['0']}]")


def test_n_m_training_shares_no_layer_with_another_entry_at_the_same_time():
    model = small_mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trained = "nm_training: {pattern: '2:4', masking: ste, layers: ['2'], window: {to: 8step}}"
    recipe = f"modifiers: [{trained}, prune: {{sparsity: 0.75, window: {{from: %s}}}}]"
    with pytest.raises(ValueError, match="two entries mask 2 at the same time"):
        prunus.attach(model, optimizer, recipe % "4step")
    prunus.attach(model, optimizer, recipe % "8step")


def test_closing_early_prunes_to_the_target_and_says_so(caplog):
    model = small_mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with caplog.at_level(logging.WARNING, "prunus"), prunus.attach(model, optimizer, GRADUAL):
        train(model, optimizer, 3)
    assert abs(zeros(model) - 0.8) < 2e-3
    assert "closed at step 3 of 10" in caplog.text


def test_an_exception_closes_the_session_without_pruning_further():
    model = small_mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with (
        pytest.raises(RuntimeError, match="out of luck"),
        prunus.attach(model, optimizer, GRADUAL) as session,
    ):
        train(model, optimizer, 3)
        raise RuntimeError("out of luck")
    assert session.closed
    assert abs(zeros(model) - 0.2) < 2e-3
    train(model, optimizer, 1)
    assert session.step == 3


def test_close_is_idempotent_and_removes_the_hooks():
    model = small_mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    session = prunus.attach(model, optimizer, AT_ONCE)
    train(model, optimizer, 1)
    session.close()
    events = len(session.recorder.events)
    session.close()
    assert len(session.recorder.events) == events
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("stop", range(12))
def test_resuming_at_any_step_is_the_uninterrupted_run_bit_for_bit(stop, tmp_path):
    recipe = (
        GRADUAL + "  - learning_rate: {curve: cosine, from: 0.1, to: 0.001}\n"
        "  - freeze: {parameters: ['0.*'], window: {to: 3step}}\n"
    )
    batches = [torch.randn(4, 8) for _ in range(12)]

    def fresh():
        torch.manual_seed(3)
        model = small_mlp()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        return (
            model,
            optimizer,
            prunus.attach(model, optimizer, recipe, steps_per_epoch=4, epochs=3),
        )

    model, optimizer, session = fresh()
    train(model, optimizer, 12, batches)
    session.close()
    first = fresh()
    train(*first[:2], stop, batches)
    torch.save([part.state_dict() for part in first], tmp_path / "state.pt")
    second = fresh()
    states = torch.load(tmp_path / "state.pt", weights_only=True)
    for part, state in zip(second, states, strict=True):
        part.load_state_dict(state)
    train(*second[:2], 12 - stop, batches[stop:])
    second[2].close()
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), second[0].parameters(), strict=True)
    )
    assert all(torch.equal(session.masks[n], second[2].masks[n]) for n in session.masks)


def test_a_state_from_another_recipe_is_refused_and_nothing_changes():
    model = small_mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    session = prunus.attach(model, optimizer, AT_ONCE)
    train(model, optimizer, 2)
    state = session.state_dict()
    session.close()
    other = prunus.attach(model, optimizer, AT_ONCE.replace("0.75", "0.9"))
    with pytest.raises(ValueError, match="the state is of another recipe"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="this is not the state of a session"):
        other.load_state_dict({"step": 3})
    assert other.step == 0
    assert not other.masks
    other.close()


def test_a_state_of_another_version_is_refused():
    model = small_mlp()
    session = prunus.attach(model, torch.optim.SGD(model.parameters(), 0.1), AT_ONCE)
    with pytest.raises(ValueError, match="the state has version 2; this prunus reads 1"):
        session.load_state_dict({**session.state_dict(), "version": 2})


def test_resuming_with_epochs_of_another_length_is_said(caplog):
    recipe = "modifiers:\n  - prune: {sparsity: {from: 0.1, to: 0.5}, window: {to: 4ep}}\n"

    def attached(steps_per_epoch):
        model = small_mlp()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        return prunus.attach(model, optimizer, recipe, steps_per_epoch=steps_per_epoch)

    state = attached(2).state_dict()
    attached(2).load_state_dict(state)
    assert not caplog.text
    attached(3).load_state_dict(state)
    assert "are steps_per_epoch and epochs the same?" in caplog.text


def test_a_table_is_checked_when_attaching_and_not_in_the_middle_of_training(tmp_path):
    model = small_mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    late = "modifiers:\n  - prune: {{allocator: {}, window: {{from: 100step}}}}\n"
    with pytest.raises(ValueError, match="'7' matches no pruned layer"):
        prunus.attach(model, optimizer, late.format('{"7": 0.5, "*": 0.1}'))
    with pytest.raises(ValueError, match="no entry for '2'"):
        prunus.attach(model, optimizer, late.format('{"0": 0.5}'))
    file = tmp_path / "table.json"
    named = late.format(f"{{name: table, file: {file}}}")
    with pytest.raises(FileNotFoundError, match=r"table\.json"):
        prunus.attach(model, optimizer, named)
    for text, message in [
        ('{"*": 1.5}', "sparsity 1.5 of '\\*' is not between"),
        ("[1]", "expected a mapping"),
        ("{", "Expecting property name"),
    ]:
        file.write_text(text)
        with pytest.raises(ValueError, match=rf"allocator table: '.*table\.json': {message}"):
            prunus.attach(model, optimizer, named)


def test_a_setting_that_the_optimizer_has_not_is_refused():
    model = small_mlp()
    optimizer = torch.optim.Rprop(model.parameters())
    with pytest.raises(ValueError, match="Rprop has no 'weight_decay' to set; drop"):
        prunus.attach(model, optimizer, "modifiers:\n  - weight_decay: {to: 0.1}\n")


def test_a_state_from_another_model_is_refused():
    model, other = small_mlp(), nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with prunus.attach(model, optimizer, AT_ONCE) as session:
        train(model, optimizer, 1)
        state = session.state_dict()
    session = prunus.attach(other, torch.optim.SGD(other.parameters(), 0.1), AT_ONCE)
    with pytest.raises(ValueError, match="this model has none"):
        session.load_state_dict(state)


def test_an_optimizer_that_does_not_hold_the_weights_is_refused():
    model = small_mlp()
    optimizer = torch.optim.SGD(model[2].parameters(), 0.1)
    with pytest.raises(ValueError, match=r"the optimizer does not hold 0\.weight; attach the"):
        prunus.attach(model, optimizer, AT_ONCE)
    assert not optimizer._optimizer_step_post_hooks


def test_something_that_is_no_optimizer_is_refused():
    model = small_mlp()
    with pytest.raises(ValueError, match=r"attach needs a torch.optim.Optimizer to hook, not str"):
        prunus.attach(model, "adam", AT_ONCE)


def test_a_flattened_parameter_of_deepspeed_is_refused_by_name():
    model = small_mlp()
    for p in model.parameters():
        p.ds_id = 1
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(3))], 0.1)
    with pytest.raises(ValueError, match="DeepSpeed ZeRO flattens"):
        prunus.attach(model, optimizer, AT_ONCE)


def test_a_target_below_the_present_sparsity_is_refused_at_the_first_step():
    model = small_mlp()
    prunus.prune(model, "magnitude", sparsity=0.9)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    session = prunus.attach(model, optimizer, AT_ONCE)
    with pytest.raises(ValueError, match=r"sparsity is 0\.8997 already, above the target 0\.75"):
        train(model, optimizer, 1)
    session.close(finish=False)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_recipes_that_count_in_epochs_say_what_attach_needs():
    model = small_mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="give attach steps_per_epoch="):
        prunus.attach(
            model, optimizer, "modifiers:\n  - prune: {sparsity: 0.5, window: {from: 3ep}}\n"
        )
    with pytest.raises(ValueError, match="the window has no end"):
        prunus.attach(model, optimizer, "modifiers:\n  - prune: {sparsity: {from: 0, to: 0.5}}\n")
    with pytest.raises(ValueError, match=r"ends \(step 2\) before it begins \(step 5\)"):
        prunus.attach(
            model,
            optimizer,
            "modifiers:\n  - prune: {sparsity: {from: 0, to: 0.5}, "
            "window: {from: 5step, to: 2step}}\n",
        )


def test_a_pruning_pause_with_data_disturbs_nothing_but_the_pruned_weights():
    """Statistics are taken in eval mode; BatchNorm, dropout, RNG and gradients stay the loop's."""
    from tests.helpers.toy_pruner import Toy

    def run(pruner):
        torch.manual_seed(0)
        model = nn.Sequential(small_cnn(), nn.Dropout(0.5), nn.Linear(4, 4))
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        recipe = prunus.Recipe(
            (
                prunus.PruningModifier(
                    pruner, 0.0, layers=("0.5",), window=prunus.modifiers.timing.Window("2step")
                ),
            )
        )
        data = [torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))] * 2
        modes = []
        with prunus.attach(model, optimizer, recipe, calibration=prunus.Calibration(data)):
            for _ in range(4):
                model(torch.randn(4, 3, 8, 8)).square().mean().backward()
                optimizer.step()
                modes.append([m.training for m in model.modules()])
                optimizer.zero_grad()
        return model.state_dict(), modes

    plain, modes = run(prunus.Magnitude())
    paused, paused_modes = run(Toy())
    assert all(torch.equal(plain[name], paused[name]) for name in plain)
    assert modes == paused_modes


def test_metrics_are_recorded_at_their_step():
    model = small_mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with prunus.attach(model, optimizer, AT_ONCE) as session:
        train(model, optimizer, 2)
        session.log(loss=0.5, accuracy=torch.tensor(0.25))
    metrics = [e for e in session.recorder.events if e["event"] == "metrics"]
    assert [(e["step"], e["loss"], e["accuracy"]) for e in metrics] == [(2, 0.5, 0.25)]


def test_sparsity_is_that_of_all_layers_the_recipe_prunes_sooner_or_later():
    model = small_mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    late = "{layers: ['2'], sparsity: 0.5, window: {from: 2step}}"
    recipe = f"modifiers: [prune: {{layers: ['0'], sparsity: 0.75}}, prune: {late}]"
    whole = sum(model[i].weight.numel() for i in (0, 2))
    with prunus.attach(model, optimizer, recipe) as session:
        assert session.sparsity == 0
        train(model, optimizer, 1)
        assert session.sparsity == pytest.approx(0.75 * model[0].weight.numel() / whole, abs=1e-3)
        train(model, optimizer, 1)
        assert session.sparsity == pytest.approx(zeros(model))


def test_runs_say_which_step_changes_what_is_pruned():
    model = small_mlp()
    trained = "{pattern: '2:4', masking: sr_ste, window: {from: 3step, to: 5step}, layers: ['0']}"
    recipe = (
        f"{GRADUAL}      layers: ['2']\n  - nm_training: {trained}\n  - weight_decay: {{to: 0.0}}\n"
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    with prunus.attach(model, optimizer, recipe) as session:
        gradual, stages, other = session.runs
        for step in range(1, 12):
            assert gradual.next_change(step) == next((t for t in (2, 6, 10) if t >= step), None)
            assert stages.next_change(step) == next((t for t in (3, 5) if t >= step), None)
            assert other.next_change(step) is None
            train(model, optimizer, 1)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("pruner: cap, sparsity: 0.5", "pruner 'cap' learns from data; pass calibration="),
        ("pruner: wanda, sparsity: 0.5", "pruner 'wanda' learns from data"),
        ("allocator: owl, sparsity: 0.5", "allocator 'owl' learns from data"),
    ],
)
def test_data_that_will_be_needed_is_asked_for_when_attaching(entry, message):
    model = small_mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    late = f"modifiers: [prune: {{{entry}, window: {{from: 100step}}}}]"
    with pytest.raises(ValueError, match=message):
        prunus.attach(model, optimizer, late)
    assert not optimizer._optimizer_step_pre_hooks
    prunus.attach(model, optimizer, AT_ONCE).close(finish=False)  # nothing of the other is left
