"""Layers that are 2:4 while they compute: numbers, gradients, when masks change, swapping."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.utils.checkpoint import checkpoint

from prunus.execution.training import (
    SemiSparse,
    SemiSparseActivationLinear,
    SemiSparseLinear,
    flip_rate,
    flip_rates,
    kernels,
    legal_masks,
    refresh_masks,
    swap_linear_with_semi_sparse_linear,
    swap_semi_sparse_linear_with_linear,
    tile_mask,
)
from prunus.execution.training.linear import no_semi_sparse

RULES = ("exact", "greedy")
ACTIVATION = SemiSparse(kind="activation")


def layer(options, out=12, inputs=8, dtype=torch.float64, bias=True):
    linear = nn.Linear(inputs, out, bias=bias, dtype=dtype)
    cls = SemiSparseLinear if options.kind == "weight" else SemiSparseActivationLinear
    return cls.from_dense(linear, options)


def mlp(dtype=torch.float32):
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8)).to(dtype)


def swapped(model, **options):
    swap_linear_with_semi_sparse_linear(model, {"*": SemiSparse(**options)})
    return model


def update(module, scale=1.0):
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p), alpha=scale)


def grads(model, x, y=None):
    """The output, and the gradients of the input and of all Parameters."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    out = model(x)
    out.square().sum().backward()
    return [out.detach(), x.grad, *[p.grad.clone() for p in model.parameters()]]


def close(left, right, **tolerances):
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, **tolerances)


def weight_reference(linear, x, options):
    """What `grads` returns of a weight-sparse layer, by the formulas."""
    w, b = linear.weight.detach(), linear.bias.detach()
    m = tile_mask(w, options.rule).to(w.dtype)
    out = x @ (w * m).T + b
    g = 2 * out
    dense = g.flatten(0, -2).T @ x.flatten(0, -2)
    past = {
        "ste": dense,
        "sr_ste": dense + options.decay * (1 - m) * w,
        "masked": dense * m,
    }[options.gradient]
    return [out, g @ (w * m), past, g.flatten(0, -2).sum(0)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("gradient", ["ste", "sr_ste", "masked"])
@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (1, 8)])
def test_sparse_weights_compute_what_the_formulas_say(rule, gradient, shape):
    options = SemiSparse(rule=rule, gradient=gradient, decay=0.3)
    linear, x = layer(options), torch.randn(shape, dtype=torch.float64)
    close(grads(linear, x), weight_reference(linear, x, options))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("gradient", ["ste", "masked"])
@pytest.mark.parametrize("shape", [(8, 8), (2, 3, 8), (1, 8), (7, 8)])
def test_sparse_activations_compute_what_the_formulas_say(rule, gradient, shape):
    options = SemiSparse(kind="activation", rule=rule, gradient=gradient)
    linear, x = layer(options), torch.randn(shape, dtype=torch.float64)
    w, flat = linear.weight.detach(), x.flatten(0, -2)
    padded = torch.cat([flat, torch.zeros(-len(flat) % 4, 8, dtype=x.dtype)])
    m = tile_mask(padded, rule)[: len(flat)].to(x.dtype)
    out = (flat * m) @ w.T + linear.bias.detach()
    g = 2 * out
    into = g @ w if gradient == "ste" else g @ w * m
    expected = [out.view(*shape[:-1], 12), into.view(shape), g.T @ (flat * m), g.sum(0)]
    close(grads(linear, x), expected)


@pytest.mark.parametrize("options", [SemiSparse(gradient="masked"), SemiSparse(rule="greedy")])
def test_gradients_are_those_of_finite_differences_where_the_function_has_them(options):
    linear = layer(options)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(linear, x)
    if options.gradient == "masked":
        mask = linear.tile_mask

        def of_weight(w):
            linear.give_mask(mask)  # the mask is a constant of the derivative
            return torch.func.functional_call(linear, {"weight": w}, (x,))

        held = layer(SemiSparse(gradient="masked", refresh=0))
        mask, linear = held.tile_mask, held
        weight = held.weight.detach().clone().requires_grad_()
        assert torch.autograd.gradcheck(of_weight, weight)


def test_second_derivatives_pass():
    linear = layer(SemiSparse())
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(linear, x)


def test_gradients_of_each_sample_pass_through_vmap():
    linear = layer(SemiSparse(gradient="sr_ste", decay=0.1))
    x = torch.randn(5, 8, dtype=torch.float64)
    weights = dict(linear.named_parameters())

    def loss(weights, sample):
        return torch.func.functional_call(linear, weights, (sample,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)["weight"]
    one = torch.stack([grads(linear, sample[None])[2] for sample in x])
    torch.testing.assert_close(each, one)


def test_bias_free_layers_and_empty_batches_compute():
    for options in (SemiSparse(), ACTIVATION):
        linear = layer(options, bias=False)
        assert linear(torch.empty(0, 8, dtype=torch.float64)).shape == (0, 12)
        x = torch.randn(4, 8, dtype=torch.float64)
        dense = nn.functional.linear(x, linear.weight)
        assert not torch.allclose(linear(x), dense)


# when masks change


def test_an_unchanged_weight_keeps_its_mask_and_a_changed_one_gets_its_own():
    linear = layer(SemiSparse())
    x = torch.randn(2, 8, dtype=torch.float64)
    first = linear.mask()
    for _ in range(2):  # accumulated gradients
        linear(x).sum().backward()
    assert linear.mask() is first
    update(linear)
    linear(x)
    assert torch.equal(linear.tile_mask, tile_mask(linear.weight))
    assert not torch.equal(linear.tile_mask, first)


@pytest.mark.parametrize("refresh", [1, 2, 3, 5])
def test_masks_are_chosen_after_every_kth_update(refresh):
    linear = layer(SemiSparse(refresh=refresh))
    x = torch.randn(2, 8, dtype=torch.float64)
    mask = linear.tile_mask
    for done in range(1, 12):
        update(linear)
        update(linear)  # an optimizer writes to a weight more than once in a step
        if done % refresh == 0:
            mask = tile_mask(linear.weight)
        for _ in range(2):
            linear(x)
            assert torch.equal(linear.tile_mask, mask)


def test_evaluation_computes_what_is_trained():
    for refresh in (1, 3):
        linear = layer(SemiSparse(refresh=refresh))
        x = torch.randn(4, 8, dtype=torch.float64)
        for _ in range(5):
            update(linear)
            linear.eval()
            with torch.no_grad():
                seen = linear(x)
            linear.train()
            assert torch.equal(linear(x), seen)


@pytest.mark.parametrize("gradient", ["ste", "sr_ste", "masked"])
def test_training_goes_on_after_an_evaluation_in_inference_mode(gradient):
    model, x = swapped(mlp(), gradient=gradient), torch.randn(4, 16)
    model(x).square().sum().backward()
    update(model)
    with torch.inference_mode():  # chooses the masks
        seen = model(x)
        model[2].give_mask(model[2].tile_mask.clone())
    stored = [model[0].tile_mask, model[0].flips, model[2].tile_mask]
    assert not any(t.is_inference() for t in stored)
    torch.testing.assert_close(grads(model, x)[0], seen)


def test_tables_of_masks_made_in_inference_mode_serve_training():
    legal_masks.cache_clear()
    with torch.inference_mode():
        assert not legal_masks().is_inference()


def test_weights_written_past_autograd_get_their_masks_by_request():
    model = swapped(mlp(), refresh=0)
    for _ in range(2):
        model(torch.randn(2, 16))
        model[0].weight.data.copy_(torch.randn(32, 16))
        refresh_masks(model)
        assert torch.equal(model[0].tile_mask, tile_mask(model[0].weight))


def test_without_refresh_masks_change_by_request_alone():
    model = swapped(mlp(), refresh=0)
    first = model[0].tile_mask
    update(model)
    model(torch.randn(2, 16))
    assert model[0].tile_mask is first
    refresh_masks(model)
    assert torch.equal(model[0].tile_mask, tile_mask(model[0].weight))


def test_refreshing_from_outside_counts_as_forward_passes_do():
    inside = swapped(mlp(), refresh=2)
    outside = copy.deepcopy(inside)
    x = torch.randn(2, 16)
    for seed in range(6):
        for model in (inside, outside):
            torch.manual_seed(seed)
            update(model)
        refresh_masks(outside)
        refresh_masks(outside)  # the weight is as before
        assert torch.equal(inside(x), outside(x))


def test_flip_rates_are_shares_of_changed_entries():
    linear = nn.Linear(4, 4, bias=False)
    model = nn.Sequential(linear, nn.Linear(4, 8, bias=False))
    block = torch.ones(2, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.block_diag(block, block))
    swap_linear_with_semi_sparse_linear(model, {"*": SemiSparseLinear})
    assert math.isnan(flip_rate(model))
    assert flip_rates(model) == {}
    x = torch.randn(2, 4)
    with torch.no_grad():
        linear.weight.copy_(linear.weight.flip(0))
        model[1].weight.mul_(2.0)
    model(x)
    assert flip_rates(model) == {"0": 1.0, "1": 0.0}
    assert flip_rate(model) == pytest.approx(16 / 48)
    with torch.no_grad():  # two rows trade places: four entries go, four come
        linear.weight.copy_(linear.weight[[2, 1, 0, 3]])
    model(x)
    assert flip_rates(model)["0"] == 0.5


def test_loaded_weights_bring_their_masks():
    for refresh in (0, 1, 7):
        model, other = swapped(mlp(), refresh=refresh), mlp()
        model.load_state_dict(other.state_dict())
        assert torch.equal(model[0].mask(), tile_mask(other[0].weight))
        assert model[0].flips is None


def test_a_given_mask_stays_when_weights_are_loaded_until_the_next_is_due():
    model = swapped(mlp(), refresh=2)
    mask = torch.rand(32, 16) < 0.5
    model[0].give_mask(mask)
    model.load_state_dict(mlp().state_dict())
    assert torch.equal(model[0].tile_mask, mask)
    for _ in range(2):
        update(model)
        model(torch.randn(1, 16))
    assert torch.equal(model[0].tile_mask, tile_mask(model[0].weight))
    with pytest.raises(ValueError, match=r"the mask is \(4, 4\); the weight is \(32, 16\)"):
        model[0].give_mask(mask[:4, :4])


# around the layers


# torch 2.6 says it of itself when it traces an autograd function
traced = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@traced
@pytest.mark.parametrize("options", [SemiSparse(), SemiSparse(refresh=2), ACTIVATION])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_computes_the_same(options, backend):
    torch._dynamo.reset()
    model = mlp(torch.float64)
    swap_linear_with_semi_sparse_linear(model, {"*": options})
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for seed in range(5):
        x = torch.randn(6, 16, dtype=torch.float64)
        close(grads(compiled, x), grads(twin, x))
        for net in (model, twin):
            torch.manual_seed(seed)
            update(net, 0.1)
        refresh_masks(model)


@traced
def test_a_model_compiled_before_is_compiled_again_when_it_is_swapped():
    torch._dynamo.reset()
    model, x = mlp(), torch.randn(4, 16)
    compiled = torch.compile(model, backend="eager")
    dense = compiled(x)
    swap_linear_with_semi_sparse_linear(compiled, {"0": SemiSparseLinear})
    assert isinstance(model[0], SemiSparseLinear)
    assert torch.equal(compiled(x), model(x))
    assert not torch.allclose(compiled(x), dense)
    swap_semi_sparse_linear_with_linear(compiled)
    assert torch.equal(compiled(x), dense)


@pytest.mark.parametrize("options", [SemiSparse(gradient="sr_ste", decay=0.1), ACTIVATION])
def test_autocast_computes_in_low_precision_with_masks_of_the_full_weight(options):
    model, x = mlp(), torch.randn(8, 16)
    swap_linear_with_semi_sparse_linear(model, {"0": options})
    full = grads(model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = grads(model, x)
    assert half[0].dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in half[1:])
    close([g.float() for g in half], full, rtol=0.1, atol=0.1)
    if options.kind == "weight":
        assert torch.equal(model[0].tile_mask, tile_mask(model[0].weight))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("options", [SemiSparse(gradient="sr_ste"), ACTIVATION])
def test_checkpointed_activations_give_the_same_gradients(options, reentrant):
    model, x = mlp(torch.float64), torch.randn(8, 16, dtype=torch.float64)
    swap_linear_with_semi_sparse_linear(model, {"*": options})
    plain = grads(model, x)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    close(grads(Checkpointed(), x), plain, rtol=0, atol=0)


def test_a_copy_goes_on_by_itself_and_as_the_original_would():
    model, x = swapped(mlp(), refresh=2), torch.randn(4, 16)
    update(model)
    model(x)
    update(model)  # due, and not seen yet
    twin = copy.deepcopy(model)
    first = twin[0].tile_mask
    update(model)
    assert torch.equal(twin[0].tile_mask, first)
    assert torch.equal(twin[0].mask(), tile_mask(twin[0].weight))
    assert not torch.equal(twin[0].tile_mask, first)
    assert not torch.equal(twin(x), model(x))


def test_a_moved_or_cast_layer_keeps_a_mask_of_its_weight():
    model = swapped(mlp())
    model.to(torch.bfloat16)
    assert torch.equal(model[0].mask(), tile_mask(model[0].weight))
    assert model(torch.randn(2, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


# swapping


def test_a_round_trip_changes_nothing_but_the_class():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    names, attributes = list(before), [sorted(vars(m)) for m in modules]
    x = torch.randn(4, 16)
    dense = model(x)
    swap_linear_with_semi_sparse_linear(model, {"0": SemiSparseLinear, "re:[2-9]": ACTIVATION})
    assert [type(m) for m in model] == [SemiSparseLinear, nn.GELU, SemiSparseActivationLinear]
    assert list(model.modules()) == modules
    assert list(model.state_dict()) == names
    held = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert {id(p) for p in model.parameters()} == held
    model(x)
    swap_semi_sparse_linear_with_linear(model)
    assert torch.equal(model(x), dense)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [sorted(vars(m)) for m in modules] == attributes
    assert len(calls) == 3


def test_a_swapped_layer_can_be_swapped_to_other_settings():
    model = swapped(mlp())
    swap_linear_with_semi_sparse_linear(model, {"0": SemiSparseActivationLinear})
    assert type(model[0]) is SemiSparseActivationLinear
    assert not hasattr(model[0], "tile_mask")
    swapped(model, rule="greedy")
    assert torch.equal(model[0].tile_mask, tile_mask(model[0].weight, "greedy"))
    assert "rule=greedy, ste" in repr(model)


def test_a_layer_may_be_made_semi_sparse_from_the_start():
    linear = SemiSparseLinear(8, 4)
    assert linear(torch.randn(2, 8)).shape == (2, 4)
    assert torch.equal(linear.tile_mask, tile_mask(linear.weight))
    assert type(linear.to_dense(linear)) is nn.Linear


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(16, 8)
        self.narrow = nn.Linear(8, 6)
        self.attn = nn.MultiheadAttention(8, 2)
        self.patched = nn.Linear(8, 8)
        self.patched.forward = self.patched.forward
        self.computed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"fc3": SemiSparseLinear}, "layer pattern 'fc3' matches nothing; nearest: fc1"),
        ({"fc1": SemiSparseLinear, "narrow": SemiSparseLinear}, r"narrow \(Linear\) has out_features=6, no multiple of 4"),
        ({"fc1": SemiSparseLinear, "attn.*": SemiSparseLinear}, "attn.out_proj .* computes by a class of its own"),
        ({"fc1": SemiSparseLinear, "patched": SemiSparseLinear}, "patched .* has a forward of its own on the instance"),
        ({"fc1": SemiSparseLinear, "computed": SemiSparseLinear}, "computed .* computes by a class of its own"),
        ({"fc1": SemiSparseLinear, "fc*": ACTIVATION}, "fc1 is in both 'fc1' and 'fc\\*'"),
        ({"fc1": nn.Linear}, "config holds .*; give SemiSparseLinear or SemiSparseActivationLinear"),
    ],
)  # fmt: skip
def test_what_cannot_be_swapped_is_refused_with_a_reason_and_nothing_changes(config, message):
    model = Odd()
    with pytest.raises(ValueError, match=message):
        swap_linear_with_semi_sparse_linear(model, config)
    assert type(model.fc1) is nn.Linear


def test_narrow_outputs_may_have_sparse_inputs():
    model = Odd()
    swap_linear_with_semi_sparse_linear(model, {"narrow": SemiSparseActivationLinear})
    assert model.narrow(torch.randn(3, 8)).shape == (3, 6)


def test_pruned_and_unshaped_layers_are_refused():
    pruned = torch_prune.identity(nn.Linear(8, 8), "weight")
    with pytest.raises(ValueError, match="has a computed weight"):
        SemiSparseLinear.from_dense(pruned)
    with pytest.raises(ValueError, match="this LazyLinear computes by a class of its own"):
        SemiSparseLinear.from_dense(nn.LazyLinear(8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "best"}, "rule='best' is not known; one of: exact, greedy"),
        ({"kind": "both"}, "kind='both' is not known"),
        ({"gradient": "dense"}, "gradient='dense' is not known"),
        ({"decay": -1e-4}, "decay=-0.0001 lets hidden weights grow"),
        ({"refresh": -1}, "refresh=-1; give 1 or more"),
        ({"kind": "activation", "gradient": "sr_ste"}, "activations are none; use 'ste'"),
        ({"kind": "activation", "refresh": 2}, "drop 'refresh'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SemiSparse(**settings)


def test_weights_on_the_meta_device_can_be_swapped_and_get_their_masks_with_their_values():
    with torch.device("meta"):
        model = mlp()
    swapped(model)
    model.load_state_dict(mlp().state_dict(), assign=True)
    assert torch.equal(model[0].tile_mask, tile_mask(model[0].weight))


# sparse tensor cores


class SaysCuda(nn.Parameter):
    is_cuda = True


def stand_in(t):
    """What the kernel's rule leaves of an operand, dense; it must lose nothing."""
    left = torch.where(tile_mask(t, "greedy"), t, 0)
    assert torch.equal(left, t)
    assert not any(side % 64 for side in t.shape)
    return left


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["weight", "activation"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_path_of_the_kernels_is_that_of_dense_products(monkeypatch, kind, rule, bias):
    linear = layer(SemiSparse(kind=kind, rule=rule), 192, 64, bias=bias)
    x = torch.randn(3, 50, 64, dtype=torch.float64)
    slow = grads(linear, x)
    calls = []
    monkeypatch.setattr(kernels, "available", lambda x, w: x.numel() > 0)
    monkeypatch.setattr(kernels, "pack", lambda t: calls.append(t) or stand_in(t))
    close(grads(linear, x), slow)
    assert len(calls) == 1
    linear(x[:0]).sum().backward()
    frozen = linear.requires_grad_(False)(x.requires_grad_())
    torch.testing.assert_close(torch.autograd.grad(frozen.square().sum(), x)[0], slow[1])


@pytest.mark.parametrize(
    ("options", "out", "inputs", "message"),
    [
        (SemiSparse(), 128, 96, "in_features=96, no multiple of 64"),
        (SemiSparse(), 96, 128, "out_features=96, no multiple of 64"),
        (ACTIVATION, 100, 128, "out_features=100, no multiple of 8"),
        (ACTIVATION, 128, 72, "in_features=72, no multiple of 64"),
    ],
)
def test_sides_that_the_kernels_do_not_take_are_refused_on_cuda(options, out, inputs, message):
    linear = nn.Linear(inputs, out)
    assert not no_semi_sparse(linear, options)
    linear.weight = SaysCuda(linear.weight.data)
    assert message in no_semi_sparse(linear, options)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["weight", "activation"])
@pytest.mark.parametrize("sides", [(256, 128), (192, 64)])  # cuSPARSELt's and CUTLASS's multiples
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_kernels_compute_what_dense_products_do(rule, kind, sides, dtype):
    out, inputs = sides
    options = SemiSparse(kind=kind, rule=rule)
    linear = layer(options, out, inputs, dtype).cuda()
    x = torch.randn(3, 50, inputs, device="cuda", dtype=dtype)
    twin = layer(options, out, inputs, torch.float64).cuda()
    twin.load_state_dict(linear.state_dict())
    fast, slow = grads(linear, x), grads(twin, x.double())
    close([t.double() for t in fast], slow, rtol=2e-2, atol=2e-2 * slow[2].abs().max().item())


@pytest.mark.gpu
@needs_gpu
def test_the_kernels_take_autocast_and_refuse_odd_sides():
    linear = layer(SemiSparse(), 128, 128, torch.float32).cuda()
    x = torch.randn(32, 128, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        half = linear(x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), linear(x), rtol=5e-2, atol=5e-2)
    with pytest.raises(ValueError, match="no multiple of 64"):
        SemiSparseLinear.from_dense(nn.Linear(96, 128, device="cuda"))
