"""Forms of weights, and the modules that run them."""

import copy
import functools
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import prunus
from prunus.execution.inference import forms, restore, semi_structured
from prunus.execution.inference.candidates import candidates
from prunus.execution.inference.forms import Compressed, Spec
from prunus.execution.inference.modules import (
    Sparse,
    SparseLinear,
    become_dense,
    become_sparse,
    matrix_of,
)
from prunus.execution.inference.stored import Inexact, Stored
from prunus.execution.inference.zeros import pattern_of

SIDES = [1, 4, 8, 16]


def bits(t):
    return t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def same(a, b):
    """Two state dicts with the same keys in the same order, and the same bits."""
    return list(a) == list(b) and all(torch.equal(bits(a[k]), bits(b[k])) for k in a)


def blocky(rows, cols, side, sparsity=0.8, dtype=torch.float32):
    """A weight whose zeros are square blocks, all with the sign that a multiplied mask leaves."""
    keep = torch.rand(rows // side, cols // side) > sparsity
    keep = keep.repeat_interleave(side, 0).repeat_interleave(side, 1)
    return torch.randn(rows, cols, dtype=dtype) * keep


def sparse_linear(rows=32, cols=48, side=1, bias=True, dtype=torch.float32, sparsity=0.8):
    layer = nn.Linear(cols, rows, bias=bias, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(blocky(rows, cols, side, sparsity, dtype))
    dense = copy.deepcopy(layer)
    become_sparse(layer, Stored.of(matrix_of(layer), spec(side)), 4)
    return layer, dense


def spec(side):
    name = "csr" if side == 1 else f"bsr {side}x{side}"
    return Spec(name, lambda matrix: Compressed.of(matrix, side))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(SIDES),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 9),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([0.0, 0.5, 0.9, 1.0]),
)
def test_every_form_computes_what_the_dense_layer_does(side, p, q, n, bias, dtype, sparsity):
    w = blocky(16 * p, 16 * q, side, sparsity, dtype)
    b = torch.randn(16 * p, dtype=dtype) if bias else None
    x = torch.randn(n, 16 * q, dtype=dtype)
    form = Compressed.of(w, side)
    got = form.linear(x, b)
    want = x.double() @ w.double().T + (0 if b is None else b.double())
    assert got.dtype == dtype
    assert got.is_contiguous()
    torch.testing.assert_close(
        got.double(), want, rtol=0, atol=1e-4 if dtype.itemsize == 4 else 1e-12
    )
    assert torch.equal(form.dense(), w)


@pytest.mark.parametrize("shape", [(48,), (1, 48), (5, 48), (0, 48), (2, 3, 48), (2, 3, 5, 48)])
@pytest.mark.parametrize("side", SIDES)
def test_inputs_of_any_rank_run(shape, side):
    layer, dense = sparse_linear(side=side)
    x = torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), dense(x), rtol=0, atol=1e-5)
        if x.dim() > 1:
            strided = torch.randn(*shape[:-2], 48, shape[-2]).transpose(-1, -2)
            torch.testing.assert_close(layer(strided), dense(strided), rtol=0, atol=1e-5)


def test_the_wrong_number_of_inputs_is_an_error_not_a_reshape():
    layer, _ = sparse_linear(cols=48)
    with torch.no_grad(), pytest.raises(RuntimeError):
        layer(torch.randn(3, 96))


@pytest.mark.parametrize("side", SIDES)
def test_a_stored_weight_comes_back_to_the_bit_with_the_signs_of_its_zeros(side):
    w = blocky(32, 48, side)
    assert (w[w == 0].signbit()).any()
    stored = Stored.of(w, spec(side))
    assert torch.equal(bits(stored.dense()), bits(w))
    assert stored.nbytes == stored.form.nbytes + 32 * 48 // 8
    assert Stored.of(w.abs() * (w != 0), spec(side)).signs is None


def test_a_form_that_changes_a_weight_is_refused():
    with pytest.raises(Inexact, match="csr does not give these weights back"):
        Stored.of(blocky(8, 8, 1), Spec("csr", lambda m: Compressed.of(m + 1e-6)))


def test_csr_takes_eight_bytes_for_each_float_that_is_left():
    w = blocky(64, 64, 1).abs()
    assert Compressed.of(w).nbytes == 8 * int(w.count_nonzero()) + 4 * 65


def test_the_module_keeps_its_name_its_place_and_its_hooks():
    model = nn.Sequential(nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 4))
    seen = []
    model[0].register_forward_hook(lambda m, args, y: seen.append(y.shape))
    first, parameter = model[0], model[0].weight
    with torch.no_grad():
        parameter.copy_(blocky(32, 48, 1))
    become_sparse(first, Stored.of(matrix_of(first), spec(1)), 4)
    assert isinstance(first, nn.Linear)
    assert type(first) is SparseLinear
    assert model[0] is first
    with torch.no_grad():
        model(torch.randn(3, 48))
    assert seen == [(3, 32)]
    assert [name for name, _ in model.named_parameters()] == ["0.bias", "2.weight", "2.bias"]
    assert parameter.numel() == 0  # its memory is free


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("bias", [True, False])
def test_restoring_puts_the_same_parameter_back_to_the_bit(side, bias):
    layer = nn.Linear(48, 32, bias=bias)
    layer.weight.requires_grad_(False)
    with torch.no_grad():
        layer.weight.copy_(blocky(32, 48, side))
    parameter, before = layer.weight, layer.weight.detach().clone()
    names = [name for name, _ in layer.named_parameters()]
    become_sparse(layer, Stored.of(matrix_of(layer), spec(side)), 4)
    become_dense(layer)
    assert type(layer) is nn.Linear
    assert layer.weight is parameter
    assert torch.equal(bits(parameter), bits(before))
    assert not parameter.requires_grad
    assert [name for name, _ in layer.named_parameters()] == names
    assert not hasattr(layer, "_held")


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("side", [1, 8])
def test_a_copy_runs_sparse_on_its_own(twin, side, monkeypatch):
    layer, dense = sparse_linear(side=side)
    layer._held.stored = Stored.of(matrix_of(dense), candidate(dense, side))
    other = twin(layer)
    assert type(other) is SparseLinear
    assert same(other.state_dict(), dense.state_dict())
    become_dense(other)
    with torch.no_grad():
        other.weight.zero_()
    assert same(layer.state_dict(), dense.state_dict())
    x = torch.randn(3, 48)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), dense(x), rtol=0, atol=1e-5)


def candidate(layer, side):
    return next(s for s in candidates(matrix_of(layer), 4)[0] if s.name == spec(side).name)


def test_loading_a_dense_state_forms_it_anew():
    layer, dense = sparse_linear()
    state = {key: -2 * t for key, t in dense.state_dict().items()}
    layer.load_state_dict(state)
    assert type(layer) is SparseLinear
    assert torch.equal(layer.weight, state["weight"])
    assert torch.equal(layer.bias, state["bias"])
    x = torch.randn(3, 48)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), -2 * dense(x), rtol=0, atol=1e-5)


def test_loading_a_weight_without_zeros_makes_the_layer_dense():
    layer, dense = sparse_linear()
    state = {**dense.state_dict(), "weight": torch.randn(32, 48)}
    layer.load_state_dict(state)
    assert type(layer) is nn.Linear
    assert same(layer.state_dict(), state)


def test_loading_says_what_is_missing_unexpected_or_of_another_shape():
    layer, dense = sparse_linear()
    with pytest.raises(RuntimeError, match='Missing key.*"weight"'):
        layer.load_state_dict({"bias": dense.bias})
    with pytest.raises(RuntimeError, match='Unexpected key.*"more"'):
        layer.load_state_dict({**dense.state_dict(), "more": torch.ones(1)})
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer.load_state_dict({**dense.state_dict(), "weight": torch.ones(2, 2)})
    assert type(layer) is SparseLinear
    assert same(layer.state_dict(), dense.state_dict())


def test_the_backward_pass_is_an_error_and_the_forward_pass_is_not():
    layer, dense = sparse_linear()
    y = layer(torch.randn(3, 48))
    assert y.requires_grad
    with pytest.raises(RuntimeError, match=r"has no backward pass; call restore\(\)"):
        y.sum().backward()
    with pytest.raises(RuntimeError, match="has no backward pass"):
        torch.autograd.grad(layer(torch.randn(3, 48, requires_grad=True)).sum(), layer.bias)
    with torch.no_grad():
        assert not layer(torch.randn(3, 48)).requires_grad
    with torch.inference_mode():
        layer(torch.randn(3, 48))
    become_dense(layer)
    layer(torch.randn(3, 48)).sum().backward()
    assert layer.weight.grad.shape == dense.weight.shape


@pytest.mark.parametrize("twin", [False, True])
def test_the_backward_pass_through_a_weight_that_is_read_is_an_error(twin):
    layer, dense = sparse_linear()
    layer = copy.deepcopy(layer) if twin else layer
    y = nn.functional.linear(torch.randn(3, 48), layer.weight, layer.bias)
    with pytest.raises(RuntimeError, match=r"has no backward pass; call restore\(\)"):
        y.sum().backward()
    assert not layer.state_dict()["weight"].requires_grad
    assert layer.state_dict(keep_vars=True)["weight"].requires_grad
    with torch.no_grad():
        assert not layer.weight.requires_grad
    layer._held.parameter.requires_grad_(False)
    assert not layer.weight.requires_grad
    assert torch.equal(layer.weight, dense.weight)


def test_a_weight_cannot_be_put_in_place_of_the_sparse_one():
    layer, dense = sparse_linear()
    other = nn.Parameter(torch.ones_like(dense.weight))
    with pytest.raises(RuntimeError, match=r"is read-only; call restore\(\)"):
        layer.weight = other
    with pytest.raises(RuntimeError, match="is read-only"):
        torch.func.functional_call(layer, {"weight": other}, (torch.randn(3, 48),))
    layer.bias = nn.Parameter(torch.ones(32))
    x = torch.zeros(3, 48)
    assert torch.equal(layer(x), torch.ones(3, 32))
    assert torch.func.functional_call(layer, {"bias": torch.zeros(32)}, (x,)).eq(0).all()
    become_dense(layer)
    layer.weight = other
    assert layer.weight is other


def test_autocast_gets_its_dtype_and_the_form_computes_in_its_own():
    layer, dense = sparse_linear()
    x = torch.randn(3, 48)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, want = layer(x), dense(x)
        half = layer(x.bfloat16())
    assert got.dtype == half.dtype == want.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(got, dense(x).bfloat16())
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    doubled, plain = sparse_linear(dtype=torch.float64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert doubled(x.double()).dtype == plain(x.double()).dtype == torch.float64


@pytest.mark.parametrize("move", [lambda m: m.double(), lambda m: m.to("meta")])
def test_a_moved_model_is_dense_again_and_says_so(move):
    layer, dense = sparse_linear()
    model = nn.Sequential(layer)
    with pytest.warns(UserWarning, match="is dense again; call prunus.accelerate anew"):
        move(model)
    assert type(layer) is nn.Linear
    assert layer.weight.dtype == move(dense).weight.dtype
    assert layer.weight.device == dense.weight.device
    assert model.state_dict().keys() == {"0.weight", "0.bias"}


def test_what_moves_nothing_leaves_the_form():
    layer, _ = sparse_linear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nn.Sequential(layer).to("cpu").float().eval().train().requires_grad_(False)
    assert type(layer) is SparseLinear


def test_conv1d_of_transformers_runs_transposed():
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(32, 48)
    with torch.no_grad():
        layer.weight.copy_(blocky(48, 32, 1))
        layer.bias.normal_()
    dense = copy.deepcopy(layer)
    become_sparse(layer, Stored.of(matrix_of(layer), spec(1)), 4)
    assert isinstance(layer, Conv1D)
    assert isinstance(layer, Sparse)
    x = torch.randn(2, 3, 48)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), dense(x), rtol=0, atol=1e-5)
    assert same(layer.state_dict(), dense.state_dict())
    assert float(prunus.sparsity(layer)) == float(prunus.sparsity(dense))
    assert same(copy.deepcopy(layer).state_dict(), dense.state_dict())
    restore(layer)
    assert type(layer) is Conv1D
    assert same(layer.state_dict(), dense.state_dict())


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: torch.randn(32, 32), "dense"),
        (lambda: torch.randn(32, 32) * (torch.rand(32, 32) > 0.9), "unstructured"),
        (lambda: prune_to(torch.randn(32, 32), prunus_pattern("2:4")), "2:4"),
        (lambda: prune_to(torch.randn(32, 32), prunus_pattern("1:4")), "1:4"),
        (lambda: prune_to(torch.randn(32, 32), prunus_pattern("4:8")), "4:8"),
        (lambda: prune_to(torch.randn(32, 32), prunus_pattern("4x1"), 200), "4x1"),
        (lambda: prune_to(torch.randn(32, 32), prunus_pattern("1x4"), 200), "1x4"),
        (lambda: prune_to(torch.randn(64, 64), prunus_pattern("8x8"), 50), "8x8"),
        (lambda: prune_to(torch.randn(64, 64), prunus_pattern("16x16"), 7), "16x16"),
        (lambda: torch.zeros(32, 32), "32x32"),
        (lambda: torch.randn(30, 30) * (torch.rand(30, 30) > 0.01), "unstructured"),
        (lambda: torch.zeros(3, 5), "unstructured"),
    ],
)
def test_the_pattern_of_zeros_is_recognized(made, said):
    assert pattern_of(made()) == said


def prunus_pattern(text):
    from prunus.core.patterns import parse_pattern

    return parse_pattern(text)


def prune_to(w, pattern, drop=0):
    return w * pattern.mask(pattern.pool(w.abs()), drop)


def test_reasons_name_what_is_missing():
    def reasons(w):
        specs, refused = candidates(w, 4)
        return [s.name for s in specs], refused

    names, refused = reasons(blocky(32, 32, 1))
    assert names == ["csr"]
    assert refused["bsr"] == "its zeros form no square blocks of 4, 8, 16 or 32"
    assert refused["cutlass"] == refused["cusparselt"] == "needs a CUDA device"
    names, _ = reasons(blocky(32, 32, 8))
    assert names == ["csr", "bsr 4x4", "bsr 8x8"]
    names, refused = reasons(blocky(32, 32, 1, sparsity=0.3))
    assert names == []
    assert "is too low: up to 0.50 the indices take what the zeros save" in refused["csr"]
    names, refused = reasons(blocky(32, 32, 1).bfloat16())
    assert names == []
    assert refused["csr"] == "for float32 and float64 only, and the weight is bfloat16"
    _, refused = reasons(blocky(32, 32, 1).fill_(float("nan")))
    assert set(refused.values()) == {"the weight has NaN or infinities"}


def test_a_torch_without_mkl_gives_the_reason(monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    specs, refused = forms.candidates(blocky(32, 32, 1))
    assert not specs
    assert refused["csr"] == "this torch is built without MKL"


class OnGpu:
    """What the rules for GPUs look at in a weight."""

    device = torch.device("cuda", 0)

    def __init__(self, w):
        self.w, self.dtype, self.shape = w, w.dtype, w.shape

    def __ne__(self, other):
        return self.w != other


@pytest.mark.parametrize(
    ("make", "name", "said"),
    [
        (lambda: nm(64, 64), "cutlass", ""),
        (lambda: nm(64, 64), "cusparselt-searched", ""),
        (
            lambda: torch.ones(64, 64).half(),
            "cutlass",
            "not 2:4 in the order in which it is stored",
        ),
        (lambda: nm(60, 64), "cutlass", "outputs must divide by 32 and inputs by 64"),
        (lambda: nm(60, 64), "cusparselt", "outputs must divide by 16 and inputs by 16"),
        (lambda: nm(64, 64).double(), "cutlass", "and the weight is float64"),
        (lambda: nm(64, 64).float(), "cusparselt", "and the weight is float32"),
    ],
)
def test_rules_of_the_gpu_forms(make, name, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    got = semi_structured._unfit(OnGpu(make()), name)
    assert said in got
    assert bool(said) == bool(got)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_packed_for_a_gpu_comes_back_to_the_bit(dtype, monkeypatch):
    # packing and unpacking run anywhere, but for the check that there is a GPU
    kind = torch.sparse.SparseSemiStructuredTensorCUTLASS
    monkeypatch.setattr(kind, "_validate_device_dim_dtype_shape", lambda t: None)
    w = nm(64, 128, dtype)
    build = functools.partial(semi_structured.SemiStructured, backend="cutlass")
    stored = Stored.of(w, Spec("cutlass", build))
    assert 16 * stored.form.nbytes == 9 * w.nbytes
    assert stored.nbytes == stored.form.nbytes + 64 * 128 // 8  # the signs of zeros
    for other in (copy.deepcopy(stored), pickle.loads(pickle.dumps(stored))):
        assert type(other.form) is semi_structured.SemiStructured
        assert torch.equal(bits(other.dense()), bits(w))


def test_old_gpus_have_no_sparse_units(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 8.0" in semi_structured._unfit(OnGpu(nm(64, 64)), "cutlass")


def nm(rows, cols, dtype=torch.float16):
    return prune_to(torch.randn(rows, cols), prunus_pattern("2:4")).to(dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_gpu_forms_compute_what_the_dense_layer_does(dtype, rows):
    w, b = nm(128, 256, dtype).cuda(), torch.randn(128, dtype=dtype, device="cuda")
    x = torch.randn(rows, 256, dtype=dtype, device="cuda")
    specs, refused = semi_structured.candidates(w, rows)
    assert specs, refused
    for each in specs:
        stored = Stored.of(w, each)
        assert torch.equal(bits(stored.dense()), bits(w))
        assert stored.form.nbytes < 0.6 * w.nbytes
        got = stored.form.linear(x, b)
        want = x.double() @ w.double().T + b.double()
        torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-1)
        other = copy.deepcopy(stored)
        assert torch.equal(other.form.linear(x, b), got)
