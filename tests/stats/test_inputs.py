"""Statistics of inputs beside sums over patches cut out one by one, and the passes that fill them."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import prunus
from prunus.calibration.input_pass import measure_inputs
from prunus.core.layers import all_layers
from prunus.stats import InputGram, InputNorm, inputs

from tests.oracles.layerwise import damped, gram, input_rows
from tests.oracles.second_order import inverse

FEW = settings(deadline=None, max_examples=25)
SEEDS = st.integers(0, 99)


def close(mine, theirs, tolerance=1e-10):
    torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def only_layer(module, channels_inner=False):
    layer = next(iter(all_layers(nn.Sequential(module))))
    return layer.with_channels_inner() if channels_inner else layer


def whole(stat):
    return stat.gram("cpu")


def empty_gram(layer):
    return InputGram(layer.matrix_shape()[1], dtype=torch.float64)


def check(module, x, channels_inner):
    """Both statistics of a layer's input beside those of its patches."""
    layer, rows = only_layer(module, channels_inner), input_rows(module, x, channels_inner)
    matrix, norm = empty_gram(layer), InputNorm(layer.matrix_shape()[1])
    for stat in (matrix, norm):
        stat.update(layer.input_matrix(x))
    close(whole(matrix), gram(rows))
    assert matrix.count == len(rows)
    close(matrix.norm, rows.norm(dim=0))
    close(norm.norm.double(), rows.norm(dim=0), 1e-5)


@st.composite
def convolutions(draw):
    """A convolution of any geometry, and an input that it fits on."""
    dims = draw(st.sampled_from([1, 2]))
    small = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(dims))  # noqa: E731
    kernel, stride, padding, dilation = small(1, 3), small(1, 2), small(0, 2), small(1, 2)
    shape = [
        d * (k - 1) + 1 + draw(st.integers(0, 3)) for k, d in zip(kernel, dilation, strict=True)
    ]
    cls = (nn.Conv1d, nn.Conv2d)[dims - 1]
    conv = cls(draw(st.integers(1, 3)), 2, kernel, stride, padding, dilation, dtype=torch.float64)
    return conv, torch.randn(2, conv.in_channels, *shape, dtype=torch.float64)


@given(convolutions(), st.booleans())
@FEW
def test_a_convolution_is_measured_by_its_patches(case, channels_inner):
    check(*case, channels_inner)


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6), (2, 3, 2, 6)])
def test_a_linear_layer_is_measured_by_the_vectors_it_is_given(shape):
    check(nn.Linear(6, 4), torch.randn(shape, dtype=torch.float64), False)


def test_the_linear_layers_of_gpt2_are_measured_by_their_inputs():
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    module, x = Conv1D(5, 6), torch.randn(2, 3, 6, dtype=torch.float64)
    assert only_layer(module).matrix_shape() == (5, 6)
    check(module, x, False)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.integers(1, 6), SEEDS)
@FEW
def test_any_split_into_batches_gives_the_same(sizes, cols, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), cols, generator=generator, dtype=torch.float64)
    parts, once = InputGram(cols, dtype=torch.float64), InputGram(cols, dtype=torch.float64)
    norm, norm_once = InputNorm(cols), InputNorm(cols)
    once.update(x)
    norm_once.update(x)
    for part in x.split(sizes):
        parts.update(part)
        norm.update(part)
    assert parts.count == once.count == len(x)
    close(whole(parts), whole(once))
    close(norm.norm, norm_once.norm, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("step", [1, 20, 1 << 25])
def test_half_precision_inputs_are_summed_in_single_precision(dtype, step):
    x = (100 * torch.randn(30, 8)).to(dtype)  # squares overflow float16
    matrix, norm = InputGram(8), InputNorm(8)
    with mock.patch.object(inputs, "STEP", step):
        matrix.update(x)
        norm.update(x)
    expected = gram(x.double())
    assert matrix.gram("cpu").dtype == torch.float32
    close(whole(matrix).double(), expected, 1e-5 * float(expected.diagonal().max()))
    close(norm.norm.double(), expected.diagonal().sqrt(), 1e-5)


def test_bytes_are_known_before_data_and_right_after():
    for stat in (InputGram(6), InputGram(6, dtype=torch.float64), InputNorm(6)):
        promised = stat.nbytes
        stat.update(torch.randn(3, 6, dtype=torch.float64))
        assert sum(t.nbytes for t in stat.tensors()) == stat.nbytes == promised


def test_a_statistic_of_no_data_is_zero():
    stat = InputGram(3)
    assert stat.count == 0
    assert torch.equal(stat.norm, torch.zeros(3))
    assert torch.equal(whole(stat), torch.zeros(3, 3))


@given(st.permutations(range(5)), SEEDS)
@FEW
def test_a_permuted_statistic_is_that_of_the_permuted_inputs(perm, seed):
    generator = torch.Generator().manual_seed(seed)
    x, perm = torch.randn(9, 5, generator=generator, dtype=torch.float64), torch.tensor(perm)
    for fresh in (lambda: InputGram(5, dtype=torch.float64), lambda: InputNorm(5)):
        moved, direct = fresh(), fresh()
        moved.update(x)
        direct.update(x[:, perm])
        if isinstance(moved, InputGram):
            moved.factor(0.01, torch.device("cpu"))
        moved.permute(perm)
        close(moved.norm, direct.norm, 1e-5)
        if isinstance(moved, InputGram):
            close(whole(moved), whole(direct))
            close(moved.factor(0.01, moved.norm.device), direct.factor(0.01, moved.norm.device))


@given(st.integers(1, 8), st.integers(1, 12), st.sets(st.integers(0, 7)), SEEDS)
@FEW
def test_rows_of_the_factor_are_those_of_inverses_of_the_damped_rest(cols, samples, dead, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, cols, generator=generator, dtype=torch.float64)
    x[:, [j for j in dead if j < cols]] = 0
    stat = InputGram(cols, dtype=torch.float64)
    stat.update(x)
    before = whole(stat).clone()
    h, u = damped(gram(x), samples, 0.01), stat.factor(0.01, torch.device("cpu"))
    assert torch.equal(u, u.triu())
    for j in range(cols):
        close(u[j, j] * u[j, j:], inverse(h[j:, j:].contiguous())[0], 1e-7)
    assert torch.equal(whole(stat), before)


def test_the_factor_is_computed_once_until_something_changes():
    stat, cpu = InputGram(4, dtype=torch.float64), torch.device("cpu")
    stat.update(torch.randn(9, 4, dtype=torch.float64))
    first = stat.factor(0.01, cpu)
    assert stat.factor(0.01, cpu) is first
    assert stat.factor(0.1, cpu) is not first
    stat.update(torch.randn(9, 4, dtype=torch.float64))
    h = damped(whole(stat), 18, 0.1)
    u = stat.factor(0.1, cpu)
    close(u.T @ u @ h, torch.eye(4, dtype=torch.float64))


# the passes over the data


class Attention(nn.Module):
    """Three projections of one input, and one of another."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 5) for _ in range(3))
        self.out = nn.Linear(5, 6)

    def forward(self, x, attention_mask=None):
        return self.out(self.q(x) * self.k(x) + self.v(x))


class Pair(nn.Module):
    """Two layers, and how they are called."""

    def __init__(self, call, first=None, second=None):
        super().__init__()
        self.first = first or nn.Linear(4, 4, dtype=torch.float64)
        self.second = second or nn.Linear(4, 4, dtype=torch.float64)
        self.call = call

    def forward(self, x):
        return self.call(self, x)


def batches(*shape, count=3):
    return [torch.randn(shape, dtype=torch.float64) for _ in range(count)]


def passed(model, data, make=empty_gram, names=None):
    """name -> what one pass measures of all these layers together, and what it has not reached."""
    layers = [layer for layer in all_layers(model) if names is None or layer.name in names]
    stats, unreached = measure_inputs(
        model, {layer: make(layer) for layer in layers}, prunus.Calibration(data)
    )
    return {layer.name: stat for layer, stat in stats.items()}, {x.name for x in unreached}


def measured(model, data, make=empty_gram, names=None):
    stats, unreached = passed(model, data, make, names)
    assert not unreached
    return stats


def check_as_if_alone(model, data):
    """The statistics, which equal those that each layer has when measured without the others."""
    together = measured(model, data)
    for name, stat in together.items():
        alone = measured(model, data, names=[name])[name]
        assert stat.count == alone.count
        close(whole(stat), whole(alone))
    return together


def test_layers_with_one_input_share_one_statistic():
    stats = check_as_if_alone(Attention().double(), batches(2, 3, 6))
    assert stats["q"] is stats["k"] is stats["v"]
    assert stats["out"] is not stats["q"]
    assert stats["q"].count == 18


def test_a_shared_statistic_makes_no_difference_to_the_weights():
    model, data = Attention().double(), prunus.Calibration(batches(2, 3, 6))
    state = {name: t.clone() for name, t in model.state_dict().items()}
    pruner = prunus.SparseGPT()
    prunus.prune(model, pruner, sparsity=0.5, layers=["*"], calibration=data)
    for name in ("q", "k", "v"):
        alone = Attention().double()
        alone.load_state_dict(state)
        prunus.prune(alone, pruner, sparsity=0.5, layers=[name], calibration=data)
        assert torch.equal(alone.get_submodule(name).weight, model.get_submodule(name).weight)


def twice_in_later_batches(model, x):
    return model.first(x) + model.second(x if model.count == 0 else 2 * x)


def skipped_in_later_batches(model, x):
    return model.first(x) + (model.second(x) if model.count == 0 else 0)


def called_again_in_later_batches(model, x):
    y = model.first(x) + model.second(x)
    return y if model.count == 0 else y + model.second(x)


def changed_in_place(model, x):
    y = model.first(x)
    return y + model.second(torch.relu_(x))


def another_in_between(model, x):
    y = model.first(x)
    return model.second(model.first(y)) + model.second(x)


@pytest.mark.parametrize(
    "call",
    [
        twice_in_later_batches,
        skipped_in_later_batches,
        called_again_in_later_batches,
        changed_in_place,
        another_in_between,
    ],
)
def test_layers_that_part_ways_are_measured_apart(call):
    def counted(model, x):
        model.count = int(x[0, 0] > 0)
        return call(model, x.clone())

    data = batches(5, 4)
    for x, sign in zip(data, (-1, 1, -1), strict=True):
        x[0, 0] = sign
    stats = check_as_if_alone(Pair(counted), data)
    assert stats["first"] is not stats["second"]


def test_layers_that_meet_later_are_measured_right():
    def call(model, x):
        return model.first(x) + model.second(x if x[0, 0] > 0 else x.clone())

    data = batches(5, 4)
    for x, sign in zip(data, (-1, 1, 1), strict=True):
        x[0, 0] = sign
    check_as_if_alone(Pair(call), data)


def test_a_layer_called_several_times_is_measured_each_time():
    stats = check_as_if_alone(
        Pair(lambda m, x: m.second(m.first(m.second(m.first(x))))), batches(5, 4)
    )
    assert stats["first"].count == 30


def test_a_layer_called_by_keyword_is_measured():
    by_keyword = Pair(lambda m, x: m.second(input=m.first(input=x)))
    by_place = Pair(lambda m, x: m.second(m.first(x)), by_keyword.first, by_keyword.second)
    data = batches(5, 4)
    for name, stat in measured(by_keyword, data).items():
        close(whole(stat), whole(measured(by_place, data)[name]))


@pytest.mark.parametrize(
    ("kernel", "others", "shared"),
    [
        (3, {"padding": 1}, True),
        (1, {}, False),
        (3, {"padding": 1, "stride": 2}, False),
        (3, {"padding": 2, "dilation": 2}, False),
    ],
)
def test_convolutions_share_only_if_they_see_alike(kernel, others, shared):
    one = nn.Conv2d(2, 3, 3, padding=1, dtype=torch.float64)
    two = nn.Conv2d(2, 3, kernel, dtype=torch.float64, **others)
    model = Pair(lambda m, x: (m.first(x), m.second(x)), one, two)
    stats = check_as_if_alone(model, batches(2, 2, 5, 5))
    assert (stats["first"] is stats["second"]) == shared


def test_linear_layers_and_convolutions_of_one_input_are_measured_apart():
    model = Pair(lambda m, x: (m.first(x), m.second(x)), nn.Conv1d(3, 2, 1).double())
    check_as_if_alone(model, batches(2, 3, 4))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_padding_is_left_out(flat, dtype):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Attention().double()

        def forward(self, x, attention_mask):
            return self.attention(x.flatten(0, 1) if flat else x)

    model = Model()
    masks = [torch.tensor([[1, 1, 0], [1, 0, 0]]), torch.ones(2, 3), torch.zeros(2, 3)]
    masks = [mask.to(dtype) for mask in masks]
    data = [
        {"x": x, "attention_mask": mask} for x, mask in zip(batches(2, 3, 6), masks, strict=True)
    ]
    real = torch.cat([batch["x"][batch["attention_mask"].bool()] for batch in data])
    stats = measured(model, data)
    for name in "qkv":
        assert stats[f"attention.{name}"].count == 9
        close(whole(stats[f"attention.{name}"]), gram(real))
    with torch.no_grad():
        inner = model.attention.q(real) * model.attention.k(real) + model.attention.v(real)
    close(whole(stats["attention.out"]), gram(inner))
    norms = measured(model, data, lambda layer: InputNorm(layer.matrix_shape()[1]))
    close(norms["attention.q"].norm.double(), real.norm(dim=0), 1e-5)


def test_padding_says_nothing_of_inputs_that_are_no_tokens():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.pooled = (nn.Linear(6, 6, dtype=torch.float64) for _ in range(2))

        def forward(self, x, attention_mask):
            return self.pooled(self.tokens(x)[:, 0])

    model, x = Pooled(), batches(2, 3, 6)[0]
    data = [{"x": x, "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}]
    stats = measured(model, data)
    assert stats["tokens"].count == 3
    assert stats["pooled"].count == 2


def test_data_of_nothing_but_padding_reaches_no_layer():
    data = [{"x": batches(2, 3, 6)[0], "attention_mask": torch.zeros(2, 3, dtype=torch.int64)}]
    stats, unreached = passed(Attention().double(), data)
    assert unreached == stats.keys()
    assert torch.equal(whole(stats["q"]), torch.zeros(6, 6, dtype=torch.float64))


def test_no_data_is_refused_and_layers_out_of_reach_are_known():
    model = Pair(lambda m, x: m.first(x))
    with pytest.raises(ValueError, match="the calibration data is empty; nothing was pruned"):
        measured(model, [])
    stats, unreached = passed(model, batches(5, 4))
    assert unreached == {"second"}
    assert (stats["first"].count, stats["second"].count) == (15, 0)
    assert not model.first._forward_pre_hooks


def test_training_modes_and_hooks_are_as_before_even_after_an_error():
    def call(model, x):
        assert not model.first.training
        raise RuntimeError("on the way")

    model = Pair(call).train()
    model.second.eval()
    with pytest.raises(RuntimeError, match="on the way"):
        measured(model, batches(5, 4))
    assert (model.training, model.first.training, model.second.training) == (True, True, False)
    assert not model.first._forward_pre_hooks
