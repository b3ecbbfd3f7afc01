"""Folds that rules find by names: the function stays, and so does what N:M keeps."""

import copy
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("timm")
pytest.importorskip("transformers")

from timm.layers import BlurPool2d, SEModule
from timm.layers.mlp import GatedMlp
from timm.models.resnet import BasicBlock

from prunus.core.layers import all_layers
from prunus.engine.permute.attention import FUSED
from prunus.engine.permute.folds import AppliedFold, moved
from prunus.engine.permute.patterns import RULES, find_folds

from tests.helpers.permute_models import (
    MODELS,
    built,
    outputs,
    random_perms,
    randomize,
    small_resnet,
)
from tests.oracles.pruning import nm_keep


def plan_of(model, shared="leave"):
    return find_folds(model, list(all_layers(model)), shared)


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def close(mine, theirs):
    assert float((mine - theirs).abs().max()) <= 1e-10 * float(theirs.abs().max())


def slow_moved(old, positions, perms):
    """What a vector holds once each group is permuted within itself, in each of its copies."""
    new = list(old)
    for g, copies in enumerate(positions.tolist()):
        for at in copies:
            for j, position in enumerate(at):
                new[position] = old[at[int(perms[g, j])]]
    return new


@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 6), st.integers(0, 5), st.integers(0, 9)
)
@settings(deadline=None, max_examples=30)
def test_positions_move_as_in_the_loop(groups, copies, width, spare, seed):
    generator = torch.Generator().manual_seed(seed)
    size = groups * copies * width + spare
    somewhere = torch.randperm(size, generator=generator)[: size - spare]
    positions = somewhere.view(groups, copies, width)
    perms = torch.stack([torch.randperm(width, generator=generator) for _ in range(groups)])
    index = moved(size, positions, perms)
    assert index.tolist() == slow_moved(list(range(size)), positions, perms)
    back = moved(size, positions, perms.argsort(1))
    assert index[back].tolist() == list(range(size))


@pytest.mark.parametrize("name", MODELS)
def test_each_fold_keeps_the_function_and_undo_restores_every_bit(name):
    model, args, kwargs = built(name)
    before, state = outputs(model, args, kwargs), state_of(model)
    plan = plan_of(model)
    found = {fold.name: tuple(fold.positions.shape) for fold in plan.folds}
    assert found.items() >= MODELS[name][2].items()
    for fold in plan.folds:
        perms = random_perms(fold)
        fold.apply(perms)
        close(outputs(model, args, kwargs), before)
        fold.undo(perms)
        assert_same_state(model, state)


@pytest.mark.parametrize("name", MODELS)
def test_the_function_depends_on_every_tensor_that_moves(name):
    model, args, kwargs = built(name)
    before = outputs(model, args, kwargs)
    for fold in plan_of(model).folds:
        groups, _, width = fold.positions.shape
        perms = torch.arange(width).roll(1).expand(groups, width)
        for slot in fold.slots:
            kept = slot.tensor.detach().clone()
            slot.permute(perms)
            changed = float((outputs(model, args, kwargs) - before).abs().max())
            assert changed > 1e-9, f"{fold.name}: {slot.name}"
            slot.tensor.data.copy_(kept)


@pytest.mark.parametrize("name", MODELS)
def test_all_folds_together_keep_the_function(name):
    model, args, kwargs = built(name)
    before = outputs(model, args, kwargs)
    for fold in plan_of(model).folds:
        fold.apply(random_perms(fold))
    close(outputs(model, args, kwargs), before)


def prune_stored(layer, columns=None):
    """2:4 of magnitudes, in stored order or as if columns were in another; the new weight."""
    view = layer.with_channels_inner()
    matrix = view.matrix(layer.local)
    blocks = matrix.reshape(-1, layer.channels())
    order = torch.arange(layer.channels()) if columns is None else columns
    keep = torch.empty(blocks.shape, dtype=torch.bool)
    keep[:, order] = nm_keep(blocks[:, order].abs(), 2, 4)
    layer.local.copy_(view.unmatrix((blocks * keep).reshape(matrix.shape), layer.shape))


@pytest.mark.parametrize("name", ["llama", "gpt2", "glu", "bottleneck", "sequential", "multihead"])
def test_pruning_then_permuting_is_permuting_then_pruning(name):
    model, args, kwargs = built(name)
    other = copy.deepcopy(model)
    for mine, theirs in zip(plan_of(model).folds, plan_of(other).folds, strict=True):
        perms = random_perms(mine)
        mine.apply(perms)
        prune_stored(mine.readers[0])
        prune_stored(theirs.readers[0], theirs.columns(perms))
        close(outputs(model, args, kwargs), outputs(other, args, kwargs))
        theirs.apply(perms)
        assert_same_state(model, other.state_dict())


@pytest.mark.parametrize("name", ["llama", "bottleneck", "gpt2"])
def test_scores_of_copies_and_kernel_positions_become_rows(name):
    model, *_ = built(name)
    for fold in plan_of(model).folds:
        view = fold.readers[0].with_channels_inner()
        scores = view.matrix(view.local).abs()
        channels = view.channels()
        for g, mine in enumerate(fold.gather_scores([scores])):
            slow = []
            for at in fold.positions[g].tolist():
                for row in scores.tolist():
                    kernels = [row[k : k + channels] for k in range(0, len(row), channels)]
                    slow += [[kernel[j] for j in at] for kernel in kernels]
            assert sorted(mine.tolist()) == sorted(slow)


def test_columns_are_the_order_in_which_the_readers_weight_is_stored():
    model, *_ = built("llama")
    for fold in plan_of(model).folds:
        perms, weight = random_perms(fold), fold.readers[0].local.clone()
        fold.apply(perms)
        assert torch.equal(fold.readers[0].local, weight[:, fold.columns(perms)])


def test_strides_gradients_and_identity_of_tensors_stay():
    model = randomize(small_resnet(BasicBlock)).to(memory_format=torch.channels_last)
    model.layer1[0].conv1.weight.requires_grad_(False)
    kept = {n: (p, p.data_ptr(), p.stride(), p.requires_grad) for n, p in model.named_parameters()}
    for fold in plan_of(model).folds:
        fold.apply(random_perms(fold))
    assert model.layer1[0].conv2.weight.is_contiguous(memory_format=torch.channels_last)
    for name, p in model.named_parameters():
        assert kept[name] == (p, p.data_ptr(), p.stride(), p.requires_grad)


@pytest.mark.parametrize("bad", [torch.arange(4).view(1, 4), torch.zeros(2, 4), -torch.ones(2, 4)])
def test_what_is_no_permutation_is_refused_and_nothing_moves(bad):
    model, *_ = built("llama")
    fold, state = plan_of(model).folds[0], state_of(model)
    with pytest.raises(ValueError, match="perms="):
        fold.apply(bad)
    assert_same_state(model, state)


def test_queries_and_keys_never_move():
    for name in MODELS:
        model, *_ = built(name)
        before = state_of(model)
        for fold in plan_of(model).folds:
            fold.apply(random_perms(fold))
        for key, tensor in model.state_dict().items():
            third = tensor.shape[0] // 3 if tensor.dim() else 0
            if key.rpartition(".")[0].endswith(("q_proj", "k_proj", ".query", ".key")):
                rows = tensor.shape[0]
            elif "attn.qkv" in key or "in_proj" in key:
                rows = 2 * third
            else:
                continue
            assert torch.equal(tensor[:rows], before[key][:rows]), key


class Parts(nn.Module):
    """Named parts called one after the other."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x):
        for part in self.children():
            x = part(x)
        return x


class Packed(nn.Linear):
    def __init__(self):
        super().__init__(8, 8)
        del self.weight
        self.weight = nn.Parameter(torch.zeros(32, 1))


def linears(*between):
    return nn.Sequential(nn.Linear(8, 8), *between, nn.Linear(8, 8))


def convs(*between):
    return nn.Sequential(nn.Conv2d(4, 8, 3), *between, nn.Conv2d(8, 8, 3))


def parametrized():
    model = linears()
    nn.utils.parametrizations.weight_norm(model[0])
    return model


def sharded():
    model = linears()
    model[0].weight.to_local = lambda: None
    return model


def tied():
    model = Parts(first=linears(), second=nn.Linear(8, 8))
    model.second.weight = model.first[0].weight
    return model


def anonymous_attention(heads=None):
    model = Parts(qkv=nn.Linear(8, 24), proj=nn.Linear(8, 8))
    if heads:
        model.num_heads = heads
    return model


def two_readers():
    model = Parts(o_proj=nn.Linear(8, 8), out_proj=nn.Linear(8, 8), v_proj=nn.Linear(8, 8))
    model.head_dim = 4
    return model


REFUSED = {
    "first": (linears, "0", "no rule knows what writes its input"),
    "softmax": (lambda: linears(nn.Softmax(-1)), "2", r"1 \(Softmax\) lies between"),
    "pooling": (lambda: linears(nn.AvgPool1d(1)), "2", r"1 \(AvgPool1d\) lies between"),
    "group_norm": (lambda: convs(nn.GroupNorm(2, 8)), "2", r"1 \(GroupNorm\) lies between"),
    "squeeze": (lambda: convs(SEModule(8)), "2", r"1 \(SEModule\) lies between"),
    "blur": (lambda: convs(BlurPool2d(8)), "2", r"1 \(BlurPool2d\) lies between"),
    "block": (
        lambda: small_resnet(BasicBlock, aa_layer=BlurPool2d),
        "layer2.0.conv2",
        r"layer2.0.aa \(BlurPool2d\) lies between",
    ),
    "depthwise": (
        lambda: convs(nn.Conv2d(8, 8, 3, groups=8)),
        "2",
        "written by 1, a grouped convolution",
    ),
    "grouped": (lambda: convs(nn.Conv2d(8, 8, 3, groups=2)), "1", "1 is a grouped convolution"),
    "flatten": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 1), nn.Flatten(), nn.Linear(8, 8)),
        "2",
        r"1 \(Flatten\) makes several inputs",
    ),
    "gating_unit": (
        lambda: GatedMlp(8, 16, gate_layer=lambda width, **place: linears()),
        "fc2",
        r"gate \(Sequential\) lies between",
    ),
    "odd_norm": (lambda: linears(nn.LayerNorm((3, 8))), "2", "1.weight has shape"),
    "not_a_layer": (
        lambda: Parts(fc1=linears(), fc2=nn.Linear(8, 8)),
        "fc2",
        r"comes from fc1 \(Sequential\), which no rule knows",
    ),
    "sizes": (
        lambda: Parts(fc1=nn.Linear(8, 12), fc2=nn.Linear(8, 8)),
        "fc2",
        "fc1 has 12 outputs where 8 are read",
    ),
    "packed": (lambda: Parts(fc1=Packed(), fc2=nn.Linear(8, 8)), "fc2", "fc1 has 32 outputs"),
    "parametrized": (parametrized, "1", "0.weight is computed"),
    "sharded": (sharded, "1", "0.weight is a DTensor"),
    "tied": (tied, "first.1", "first.0.weight is tied to second.weight"),
    "no_heads": (anonymous_attention, "proj", "tells the number of heads"),
    "odd_heads": (lambda: anonymous_attention(3), "proj", "3 heads do not divide its 8 inputs"),
    "two_readers": (two_readers, "out_proj", "v_proj.weight moves with o_proj <- v_proj already"),
    "shared": (
        lambda: Parts(q_proj=nn.Linear(8, 8), k_proj=nn.Linear(8, 8)),
        "q_proj",
        "shared with k_proj, v_proj; see shared='residual' or 'gather'",
    ),
    "stream": (
        lambda: Parts(fc1=nn.Linear(8, 8)),
        "fc1",
        "shared with the rest of the residual stream",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_layer_without_a_fold_says_why(case):
    make, layer, reason = REFUSED[case]
    refused = plan_of(make()).refused
    assert layer in refused
    assert re.search(reason, refused[layer]), refused[layer]


def test_every_layer_has_a_fold_or_a_reason():
    for name in MODELS:
        model, *_ = built(name)
        layers = list(all_layers(model))
        plan = find_folds(model, layers)
        readers = {reader.name for fold in plan.folds for reader in fold.readers}
        assert not readers & plan.refused.keys()
        assert readers | plan.refused.keys() == {layer.name for layer in layers}


def test_only_the_layers_that_are_asked_for_are_readers():
    model, *_ = built("llama")
    asked = [layer for layer in all_layers(model) if layer.name.endswith("1.mlp.down_proj")]
    plan = find_folds(model, asked)
    assert [fold.readers for fold in plan.folds] == [tuple(asked)]
    assert plan.refused == {}


def add(model, path, layer):
    *parents, last = path.split(".")
    for name in parents:
        if name not in model._modules:
            model.add_module(name, Parts())
        model = model._modules[name]
    if last == "in_proj_weight":
        model.register_parameter(last, layer.weight)
    else:
        model.add_module(last, layer)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.reader} {rule.writers[0]}")
def test_every_rule_finds_its_layers(rule):
    model = Parts()
    model.head_dim = 4
    for path in (*rule.writers, rule.reader):
        add(model, path, nn.Linear(8, 24 if path in FUSED else 8))
    (fold,) = [f for f in plan_of(model).folds if f.readers[0].name == rule.reader]
    assert fold.kind == rule.kind
    assert fold.name == f"{rule.reader} <- {', '.join(rule.writers)}"


def test_buffers_that_moving_the_model_replaces_are_the_ones_that_move():
    model, args, kwargs = built("bottleneck")
    before, folds = outputs(model, args, kwargs), plan_of(model).folds
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.clone()
    state, taken = state_of(model), [(fold, random_perms(fold)) for fold in folds]
    for fold, perms in taken:
        fold.apply(perms)
    close(outputs(model, args, kwargs), before)
    for fold, perms in taken:
        fold.undo(perms)
    assert_same_state(model, state)


def test_a_fold_names_every_tensor_that_moves_tied_ones_by_all_their_names():
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    model = Parts(block=nn.Sequential(first, nn.ReLU(), second), again=nn.Linear(8, 8))
    (fold,) = plan_of(model).folds
    assert set(fold.names) == {"block.2.weight", "block.0.weight", "block.0.bias"}


@given(st.integers(0, 9), st.integers(0, 3), st.booleans())
@settings(deadline=None, max_examples=40)
def test_a_fold_taken_back_at_any_point_leaves_every_bit(seed, at, late):
    torch.manual_seed(seed)
    model = linears(nn.BatchNorm1d(8), nn.ReLU())
    (fold,), state = plan_of(model).folds, state_of(model)
    perms = random_perms(fold)
    taken, real = AppliedFold(fold, perms), torch.Tensor.copy_

    def interrupted(tensor, other):
        nonlocal at
        at -= 1
        if at == -1 and not late:
            raise KeyboardInterrupt
        real(tensor, other)
        if at == -1:
            raise KeyboardInterrupt
        return tensor

    taken.undo()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            taken.apply()
    taken.undo()
    assert_same_state(model, state)
    taken.apply()
    moved_state = state_of(model)
    taken.undo()
    taken.undo()
    assert_same_state(model, state)
    fold.apply(perms)
    assert_same_state(model, moved_state)
