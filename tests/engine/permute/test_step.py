"""Permutation as part of pruning: found, folded, verified, and taken back if anything fails."""

import copy

import pytest
import torch
from timm.models import VisionTransformer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import prunus
from prunus.core.layers import all_layers
from prunus.core.patterns import parse_pattern
from prunus.engine.method import Method
from prunus.engine.permute import folds, gather
from prunus.engine.permute import step as permuting
from prunus.engine.permute.search import retained
from prunus.engine.sequential import walk as block_walk


def llama(dtype=torch.float64):
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = LlamaForCausalLM(config).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def tokens(count=3):
    return [{"input_ids": torch.randint(32, (2, 12))} for _ in range(count)]


def small_resnet():
    block = [nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), *block, nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(128, 3)
    )
    for p in model[3].buffers():
        p.copy_(torch.rand_like(p.float()) + 0.5)
    return model.double().eval()


def state(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def is_n_of_m(weight, n, m):
    """Every m consecutive input channels keep n at most, at each kernel position."""
    rows = weight.movedim(1, -1).reshape(-1, m)
    return bool(((rows != 0).sum(1) <= n).all())


@pytest.mark.parametrize("shared", ["leave", "residual", "gather"])
@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("pruner", ["ria", "sparsegpt", "magnitude"])
def test_stored_weights_are_n_of_m_and_more_of_the_score_is_kept(shared, sequential, pruner):
    model, data = llama(), prunus.Calibration(tokens())
    result = prunus.prune(
        model,
        pruner,
        pattern="2:4",
        calibration=data,
        permute=prunus.Permute(shared=shared),
        sequential=sequential,
    )
    assert result.sparsity == 0.5
    assert len(result.permuted) >= {"leave": 3, "residual": 4, "gather": 6}[shared]
    assert all(row.after > row.before for row in result.permuted)
    for row in result.rows:
        assert is_n_of_m(model.get_submodule(row.name).weight, 2, 4)


@pytest.mark.parametrize(
    ("build", "sequential"), [(llama, False), (llama, True), (small_resnet, False)]
)
def test_pruning_follows_as_if_the_model_had_been_stored_that_way(build, sequential, monkeypatch):
    torch.manual_seed(1)
    model = build()
    batches = tokens() if build is llama else [torch.randn(4, 3, 8, 8).double() for _ in range(3)]
    data = prunus.Calibration(batches)
    done = []
    take = permuting.take

    def recorded(taken, *args):
        done.append((taken.fold.name, taken.perms))
        return take(taken, *args)

    monkeypatch.setattr(permuting, "take", recorded)
    before = copy.deepcopy(model)
    result = prunus.prune(
        model, "sparsegpt", pattern="1:4", calibration=data, permute="lsa", sequential=sequential
    )
    monkeypatch.undo()
    assert result.permuted
    layers = prunus.core.selection.select(before).layers
    method = Method(prunus.SparseGPT(), parse_pattern("1:4"), prunus.allocators.Uniform())
    plan = permuting.plan_folds(method, method.fit(layers), before, prunus.Permute())
    by_name = {fold.name: fold for fold in plan.folds}
    for name, perms in done:
        by_name[name].apply(perms)
    prunus.prune(before, "sparsegpt", pattern="1:4", calibration=data, sequential=sequential)
    for (name, a), b in zip(model.named_parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9, msg=name)


def test_permuting_alone_leaves_the_function_and_pruning_nothing_leaves_the_weights(monkeypatch):
    model, batches = llama(), tokens()
    expected = model(**batches[0]).logits
    seen = {}

    def recorded(*args):
        seen["logits"] = model(**batches[0]).logits
        raise RuntimeError("stop")

    monkeypatch.setattr(prunus.engine.plan, "prune_step", recorded)
    before = state(model)
    for shared in ("leave", "residual", "gather"):
        with pytest.raises(RuntimeError, match="stop"):
            prunus.prune(
                model,
                "wanda",
                pattern="2:4",
                calibration=prunus.Calibration(batches),
                permute=prunus.Permute(shared=shared),
            )
        # transformers' norms compute in single precision
        torch.testing.assert_close(seen["logits"], expected, rtol=1e-5, atol=1e-6)
        after = state(model)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], t) for name, t in before.items())


@pytest.mark.parametrize("shared", ["leave", "residual", "gather"])
def test_a_failure_in_the_last_block_takes_back_all_permutations(shared, monkeypatch):
    model, before = llama(), None
    before, calls = state(model), []
    real = block_walk.prune_step

    def failing(*args):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("in block 2")
        return real(*args)

    monkeypatch.setattr(block_walk, "prune_step", failing)
    with pytest.raises(RuntimeError, match="in block 2"):
        prunus.prune(
            model,
            "wanda",
            pattern="2:4",
            calibration=prunus.Calibration(tokens()),
            permute=prunus.Permute(shared=shared),
            sequential=True,
        )
    after = state(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], t) for name, t in before.items())


def test_a_fold_that_would_change_the_function_is_taken_back_with_the_reason():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.fc2(self.fc1(x).cumsum(-1)))

    model = Odd()
    fc1 = model.fc1.weight.clone()
    data = prunus.Calibration([torch.randn(4, 8)])
    result = prunus.prune(
        model, "wanda", pattern="2:4", layers=["fc2"], calibration=data, permute="lsa"
    )
    assert "the output changed" in result.not_permuted["fc2"]
    assert torch.equal(model.fc1.weight, fc1)
    assert result.rows[0].sparsity == 0.5


def test_statistics_that_cannot_follow_are_measured_again():
    model, seen = llama(torch.float32), []
    batches = [{**batch, "labels": batch["input_ids"]} for batch in tokens()]

    def forward(model, batch):
        seen.append(1)
        return model(**batch).loss

    data = prunus.Calibration(batches, forward=forward)
    result = prunus.prune(
        model, prunus.CAP(block_size=8, num_grads=3), pattern="2:4", calibration=data, permute="lsa"
    )
    assert result.permuted
    # one batch shows the head; gradients, one batch to verify, gradients again
    assert len(seen) == 1 + 3 + 1 + 3


def test_statistics_over_the_memory_are_measured_in_groups_with_the_same_result():
    plain = llama()
    tight, batches = copy.deepcopy(plain), tokens()
    for model, memory in ((plain, None), (tight, 9000)):
        data = prunus.Calibration(batches, memory=memory)
        prunus.prune(model, "sparsegpt", pattern="2:4", calibration=data, permute="lsa")
    for a, b in zip(plain.parameters(), tight.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_fewer_rows_find_an_order_that_still_helps():
    model = llama()
    few = prunus.Permute(max_rows=4)
    scores = model.model.layers[0].mlp.down_proj.weight.detach().abs()
    perm = few.perm(scores, 2, 4)
    assert sorted(perm.tolist()) == list(range(32))
    assert retained(scores[:, perm], 2, 4) > 0


def test_a_vision_transformer_is_permuted_within_blocks_and_along_its_stream():
    vit = VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=2, num_heads=2, num_classes=3
    ).eval()
    images = [torch.randn(4, 1, 8, 8) for _ in range(2)]
    result = prunus.prune(
        vit,
        "ria",
        pattern="2:4",
        calibration=prunus.Calibration(images),
        permute=prunus.Permute(shared="residual"),
        sequential=True,
    )
    assert {row.kind for row in result.permuted} == {"attention", "mlp", "residual"}
    assert not result.not_permuted
    assert "channel permutations: score kept" in str(result)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pattern": "row", "sparsity": 0.5}, "permute is for N:M patterns; pattern 'row'"),
        ({"calibration": None, "pruner": "magnitude"}, "permute runs the model"),
        ({"permute": "lsb"}, "'lsb' is not known; did you mean 'lsa'"),
    ],
)
def test_what_cannot_be_permuted_is_refused_and_the_model_untouched(change, message):
    model = llama()
    before = state(model)
    arguments = {
        "pruner": "wanda",
        "pattern": "2:4",
        "calibration": prunus.Calibration(tokens()),
        "permute": "lsa",
    }
    with pytest.raises(ValueError, match=message):
        prunus.prune(model, **{**arguments, **change})
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_permutation_is_for_finished_models_and_comes_first():
    model = llama()
    recipe = """
modifiers:
  - prune: {pruner: magnitude, pattern: "2:4", layers: ["*.q_proj"]}
  - prune: {pruner: magnitude, pattern: "2:4", layers: ["*.down_proj"], permute: {search: lsa}}
"""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="permute and prune the finished model"):
        prunus.attach(model, optimizer, recipe)
    before = state(model)
    with pytest.raises(ValueError, match="let it be in the first 'prune'"):
        prunus.prune(model, recipe, calibration=prunus.Calibration(tokens()))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_heads_that_groups_do_not_divide_are_left_with_the_reason():
    model = llama()  # heads of eight channels
    layers = [
        layer for layer in all_layers(model) if "down" in layer.name or "o_proj" in layer.name
    ]
    method = Method(prunus.Wanda(), parse_pattern("8:16"), prunus.allocators.Uniform())
    plan = permuting.plan_folds(method, method.fit(layers), model, prunus.Permute())
    assert {fold.kind for fold in plan.folds} == {"mlp"}
    assert "groups of 16 do not divide" in plan.refused["model.layers.0.self_attn.o_proj"]


def interrupted_run(shared, at, late, patch):
    """A run interrupted at this change of a tensor or an index, within a fold; was it?"""
    torch.manual_seed(0)
    model, inside, left = llama(), [], [at]
    before = state(model)

    def watch(owner, name):
        real = getattr(owner, name)

        def call(*args):
            due = bool(inside) and left[0] == 0
            left[0] -= bool(inside)
            if due and not late:
                raise KeyboardInterrupt
            done = real(*args)
            if due:
                raise KeyboardInterrupt
            return done

        patch.setattr(owner, name, call)

    apply = folds.AppliedFold.apply

    def watched(taken):
        inside.append(1)
        try:
            apply(taken)
        finally:
            inside.pop()

    watch(torch.Tensor, "copy_")
    watch(gather, "_set")
    patch.setattr(folds.AppliedFold, "apply", watched)
    data = prunus.Calibration(tokens(1))
    permute = prunus.Permute(shared=shared)
    try:
        prunus.prune(model, "ria", pattern="2:4", calibration=data, permute=permute)
    except KeyboardInterrupt:
        patch.undo()
        after = state(model)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], t) for name, t in before.items())
        return True
    patch.undo()
    return False


@pytest.mark.parametrize("shared", ["leave", "residual", "gather"])
def test_an_interrupt_anywhere_in_a_fold_leaves_the_model_as_it_was(shared, monkeypatch):
    at = 0
    while interrupted_run(shared, at, at % 2, monkeypatch):
        at += 1
    assert at > 8


def test_a_model_with_zeros_is_permuted_with_a_warning(caplog):
    model, data = llama(), prunus.Calibration(tokens())
    arguments = {"layers": ["*down_proj"], "calibration": data}
    prunus.prune(model, "ria", pattern="2:4", permute="lsa", **arguments)
    assert "zero already" not in caplog.text
    prunus.prune(model, "ria", pattern="1:4", permute="lsa", **arguments)
    assert caplog.text.count("50.0% of the weights are zero already") == 1


def test_without_a_batch_nothing_is_permuted():
    model, data = llama(), prunus.Calibration([])
    result = prunus.prune(model, "magnitude", pattern="2:4", calibration=data, permute="lsa")
    assert not result.permuted
    assert "no calibration batch" in str(result.not_permuted)
