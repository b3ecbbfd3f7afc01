"""The modifier `keep`: zeros of a loaded model stay while the rest trains."""

import contextlib
import logging

import pytest
import torch
from timm.models import VisionTransformer
from torch import nn

import prunus

from tests.distributed import workers
from tests.distributed.workers import batches, net, outcome, whole_masks, whole_state, wrapped
from tests.helpers.training import train
from tests.oracles.pruning import nm_keep, small_cnn, small_mlp

KEEP = "modifiers:\n  - keep: {}\n"
OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2),
}


def sparse_mlp(pattern=None):
    model = small_mlp()
    with torch.no_grad():
        for name in ("0.weight", "2.weight"):
            w = model.get_parameter(name)
            w.mul_(nm_keep(w.abs(), 2, 4) if pattern == "2:4" else torch.rand_like(w) > 0.7)
    return model


@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_training_is_that_of_a_loop_that_zeroes_the_same_weights_by_hand(make, pattern):
    kept, by_hand = sparse_mlp(pattern), small_mlp()
    by_hand.load_state_dict(kept.state_dict())
    masks = {
        n: p.detach() != 0 for n, p in by_hand.named_parameters() if n in ("0.weight", "2.weight")
    }
    mine, theirs = make(kept.parameters()), make(by_hand.parameters())
    with prunus.attach(kept, mine, KEEP) as session:
        train(kept, mine, 5, seed=0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        by_hand(torch.randn(4, 8, generator=generator)).square().mean().backward()
        theirs.step()
        theirs.zero_grad()
        with torch.no_grad():
            for name, mask in masks.items():
                by_hand.get_parameter(name).mul_(mask)
    for name, p in by_hand.named_parameters():
        assert torch.equal(kept.get_parameter(name), p), name
    assert session.masks.keys() == masks.keys()
    assert all(torch.equal(session.masks[name], mask) for name, mask in masks.items())


def test_weights_may_be_loaded_between_attaching_and_the_first_step():
    model, sparse = small_mlp(), sparse_mlp().state_dict()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    with prunus.attach(model, optimizer, KEEP) as session:
        assert not session.masks
        model.load_state_dict(sparse)
        train(model, optimizer, 2, seed=0)
    for name in ("0.weight", "2.weight"):
        assert torch.equal(model.get_parameter(name) != 0, sparse[name] != 0)


def test_a_model_without_zeros_is_refused_before_anything_is_trained():
    model = small_mlp()
    before = [p.clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    session = prunus.attach(model, optimizer, KEEP)
    with pytest.raises(ValueError, match="'keep' found no zero in 0 .*load the sparse weights"):
        train(model, optimizer, 1, seed=0)
    session.close(finish=False)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_layers_without_zeros_are_named_and_train_dense(caplog):
    model = small_mlp()
    with torch.no_grad():
        model[0].weight[:, ::2] = 0
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with (
        caplog.at_level(logging.WARNING, "prunus"),
        prunus.attach(model, optimizer, KEEP) as session,
    ):
        train(model, optimizer, 1, seed=0)
    assert list(session.masks) == ["0.weight"]
    assert "no zeros in 2; trained as dense layers" in caplog.text


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("{}", {"0.weight", "2.weight"}),
        ('{layers: ["0"]}', {"0.weight"}),
        ('{layers: ["Linear"], exclude: ["0"]}', {"2.weight", "4.weight"}),
    ],
)
def test_layers_are_chosen_as_for_pruning(settings, expected):
    model = sparse_mlp()
    with torch.no_grad():
        model[4].weight[0] = 0
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with prunus.attach(model, optimizer, f"modifiers:\n  - keep: {settings}\n") as session:
        train(model, optimizer, 1, seed=0)
    assert set(session.masks) == expected


def test_a_window_takes_the_zeros_at_its_beginning_and_lets_them_train_after_its_end():
    model = sparse_mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recipe = "modifiers:\n  - keep: {window: {from: 2step, to: 4step}}\n"
    zeros = []
    with prunus.attach(model, optimizer, recipe) as session:
        for step in range(6):
            if step == 2:
                with torch.no_grad():
                    model[0].weight[:, 0] = 0
            train(model, optimizer, 1, seed=step)
            zeros.append([int((model[i].weight == 0).sum()) for i in (0, 2)])
            if step == 3:
                assert session.sparsity == 0
    # the zeros of the beginning are trained away in two steps; the column lives from 2 to 4
    assert zeros == [[0, 0], [0, 0], [32, 0], [32, 0], [0, 0], [0, 0]]


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit():
    def run(stops):
        model, saved, done = sparse_mlp(), None, 0
        for stop in stops:
            optimizer = torch.optim.Adam(model.parameters(), 1e-2)
            session = prunus.attach(model, optimizer, KEEP)
            if saved:
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
                session.load_state_dict(saved[2])
            for step in range(done, stop):
                train(model, optimizer, 1, seed=step)
            done = stop
            saved = model.state_dict(), optimizer.state_dict(), session.state_dict()
            session.close(finish=False)
            if stop != stops[-1]:
                torch.manual_seed(1)
                saved = [{k: v.clone() for k, v in saved[0].items()}, *saved[1:]]
                model = small_mlp()  # dense until the weights are loaded
        return model.state_dict(), session

    torch.manual_seed(0)
    whole, session = run([6])
    torch.manual_seed(0)
    resumed, again = run([3, 6])
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert all(torch.equal(session.masks[n], m) for n, m in again.masks.items())
    assert len(again.masks) == 2


def test_pruning_goes_on_from_what_was_kept():
    model = sparse_mlp()
    zero = {n: model.get_parameter(n) == 0 for n in ("0.weight", "2.weight")}
    recipe = KEEP + "  - prune: {sparsity: 0.9, window: {from: 3step}}\n"
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with prunus.attach(model, optimizer, recipe) as session:
        train(model, optimizer, 2, seed=0)
        assert all(torch.equal(model.get_parameter(n) == 0, z) for n, z in zero.items())
        train(model, optimizer, 3, seed=0)
    assert session.sparsity == pytest.approx(0.9, abs=2e-3)
    assert all((model.get_parameter(n)[z] == 0).all() for n, z in zero.items())


def test_layers_that_another_entry_masks_are_left_to_it():
    model = sparse_mlp("2:4")
    recipe = """
modifiers:
  - nm_training: {layers: ["0"], pattern: "2:4", masking: sr_ste, window: {to: 4step}}
  - keep: {}
"""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with prunus.attach(model, optimizer, recipe) as session:
        train(model, optimizer, 6, seed=0)
    rows = model[0].weight.detach().reshape(-1, 4)
    assert ((rows != 0).sum(1) == 2).all()
    assert set(session.masks) == {"0.weight", "2.weight"}


def fused():
    """A block with a fused qkv; the zeros are in its last third."""
    model = VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=1, num_heads=2, num_classes=3
    )
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[-16:, ::2] = 0
    return model


@pytest.mark.parametrize("layers", ['"blocks.0.attn.qkv"', '"blocks.0.attn.qkv[v]"'])
def test_a_layer_of_which_another_entry_masks_a_third_is_kept_by_its_other_thirds(layers):
    model = fused()
    recipe = f"""
modifiers:
  - nm_training: {{layers: ["blocks.0.attn.qkv[q]"], pattern: "2:4", masking: ste, window: {{to: 4step}}}}
  - keep: {{layers: [{layers}]}}
"""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with contextlib.ExitStack() as stack:
        session = prunus.attach(model, optimizer, recipe)
        stack.callback(session.close, finish=False)
        if "[v]" not in layers:
            stack.enter_context(
                pytest.raises(ValueError, match=r"another entry blocks.0.attn.qkv\[q\]")
            )
        for _ in range(6):
            model(torch.randn(2, 1, 8, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        weight = model.blocks[0].attn.qkv.weight
        assert (weight[-16:, ::2] == 0).all()
        assert ((weight[:16].reshape(-1, 4) != 0).sum(1) == 2).all()
        assert (weight[16:32] != 0).all()


def test_momentum_of_what_was_zero_is_zeroed_when_keeping_begins():
    model = sparse_mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    train(model, optimizer, 1, seed=0)
    with torch.no_grad():
        model[0].weight[:, 0] = 0
    with prunus.attach(model, optimizer, 'modifiers:\n  - keep: {layers: ["0"]}\n'):
        model.zero_grad()
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    momentum = optimizer.state[model[0].weight]["momentum_buffer"]
    assert (momentum[:, 0] == 0).all()
    assert (momentum[:, 1:] != 0).any()


def test_the_records_and_the_plan_say_what_is_kept():
    model = small_cnn()
    with torch.no_grad():
        model[5].weight[:, ::2] = 0
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recipe = "modifiers:\n  - keep: {layers: [Conv2d], window: {to: 50%}}\n"
    with prunus.attach(model, optimizer, recipe, steps_per_epoch=2, epochs=2) as session:
        assert session.runs[0].timetable() == [
            (0, "keep the zeros of 3 layers"),
            (2, "let the zeros train"),
        ]
        model(torch.randn(2, 3, 8, 8)).square().mean().backward()
        optimizer.step()
    (event,) = [e for e in session.recorder.events if e["event"] == "prune"]
    assert (event["pruner"], event["pattern"], event["target"]) == ("keep", "as found", None)
    assert event["layers"] == {"5": 0.5}
    assert event["sizes"] == {"5": model[5].weight.numel()}


def test_keep_needs_training_and_takes_no_period():
    with pytest.raises(ValueError, match="no 'prune' entry"):
        prunus.prune(sparse_mlp(), KEEP)
    with pytest.raises(ValueError, match="window.every: unknown key 'every'"):
        prunus.Recipe.load("modifiers:\n  - keep: {window: {every: 1ep}}\n")


def test_an_optimizer_that_lacks_the_weights_is_refused():
    model = sparse_mlp()
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)
    with pytest.raises(ValueError, match="the optimizer does not hold"):
        prunus.attach(model, optimizer, KEEP)


def _kept_on(how, zeros):
    """A sparse model trained on; its zeros, if any, lie in the last rows, so on one rank."""
    model = net()
    with torch.no_grad():
        model.wide.weight[-3:, ::2] *= 0 if zeros else 1
    model = wrapped(model, how)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    with prunus.attach(model, optimizer, 'modifiers:\n  - keep: {layers: ["*"]}\n') as session:
        for x, y in batches(workers.STEPS):
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    return whole_masks(model, session.masks), whole_state(model), session.recorder.events


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_ranks_keep_what_one_process_does(ranks, how):
    masks, weights, events = _kept_on("plain", True)
    assert set(masks) == {"wide.weight"}
    for theirs, state, said in ranks(_kept_on, how, True):
        assert set(theirs) == set(masks)
        assert torch.equal(theirs["wide.weight"], masks["wide.weight"])
        for name, weight in weights.items():
            torch.testing.assert_close(state[name], weight, rtol=1e-10, atol=1e-10)
        assert said[1]["layers"] == events[1]["layers"]


def _refused_on_ranks():
    return outcome(lambda: _kept_on("fsdp", False))


def test_ranks_without_a_zero_are_refused_together(ranks):
    for error in ranks(_refused_on_ranks):
        assert error.startswith("ValueError: 'keep' found no zero in conv")


def test_layers_of_keep_that_stayed_dense_are_no_error_beside_those_another_entry_prunes(caplog):
    model = small_mlp()
    recipe = """
    modifiers:
      - prune: {layers: ["0"], sparsity: 0.5}
      - keep: {layers: ["0", "2"], window: {from: 2step}}
    """
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    with prunus.attach(model, optimizer, recipe) as session:
        for _ in range(4):
            model(torch.randn(4, 8)).sum().backward()
            optimizer.step()
    assert "keep: no zeros in 2; trained as dense layers" in caplog.text
    assert session.masks.keys() == {"0.weight"}
