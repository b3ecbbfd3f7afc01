"""Methods that know the inputs of a layer, on whole models."""

import functools

import pytest
import torch
from torch import nn

import prunus
from prunus import ALPS, RI, RIA, Magnitude, SparseGPT, Wanda
from prunus.core.patterns import parse_pattern
from prunus.solvers.mask_swaps import swap
from prunus.stats import InputGram

from tests.distributed.workers import batches as split_batches
from tests.distributed.workers import net, wrapped
from tests.helpers.training import same, snapshot
from tests.oracles.inputs import LEARNERS, NAMES
from tests.oracles.layerwise import input_rows, inputs_of, output_error
from tests.oracles.pruning import close

# whole models


def correlated(count, width, seed=0):
    """Features with a decaying spectrum and a few channels of large values."""
    generator = torch.Generator().manual_seed(seed)
    decay = torch.arange(1, width + 1, dtype=torch.float64).rsqrt().unsqueeze(1)
    mix = decay * torch.randn(width, width, generator=generator, dtype=torch.float64)
    x = torch.randn(count, width, generator=generator, dtype=torch.float64) @ mix
    x[:, :: width // 3] *= 10
    return x


@functools.lru_cache
def deep_state():
    return snapshot(deep(None))


def deep(state="saved"):
    model = nn.Sequential(
        nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 32)
    ).double()
    if state is not None:
        model.load_state_dict(deep_state())
    return model


def errors(pruner, pattern="row"):
    """name -> relative output error of each layer, computed from its inputs in the dense model."""
    model, data = deep(), list(correlated(300, 48).split(100))
    seen, old = inputs_of(model, data), snapshot(model)
    result = prunus.prune(
        model,
        pruner,
        layers=["*"],
        sparsity=None if ":" in pattern else 0.5,
        pattern=pattern,
        allocator=None if ":" in pattern else "uniform",
        calibration=prunus.Calibration(data),
    )
    by_hand = {
        name: output_error(rows, old[f"{name}.weight"], model.get_submodule(name).weight.detach())
        for name, rows in seen.items()
    }
    for row in result.rows:
        assert row.error is None or row.error == pytest.approx(by_hand[row.name], rel=1e-8)
    return by_hand, [row.error for row in result.rows]


@pytest.mark.parametrize("pattern", ["row", "unstructured", "2:4"])
def test_sparsegpt_loses_less_than_wanda_and_wanda_less_than_magnitude(pattern):
    magnitude, wanda, sparsegpt = (
        errors(p, pattern)[0] for p in (Magnitude(), Wanda(), SparseGPT())
    )
    for name in magnitude:
        assert sparsegpt[name] < wanda[name] < magnitude[name]


@pytest.mark.parametrize("pattern", ["row", "2:4"])
def test_every_option_lowers_the_error_of_every_layer(pattern):
    wanda, swapped, refitted, both = (
        errors(p, pattern)[0]
        for p in (Wanda(), Wanda(swap=True), Wanda(refit=True), Wanda(swap=True, refit=True))
    )
    sweep, sweep_refitted = (errors(SparseGPT(refit=r), pattern)[0] for r in (False, True))
    for name in wanda:
        assert swapped[name] < wanda[name]
        assert refitted[name] < wanda[name]
        assert both[name] < swapped[name]
        assert sweep_refitted[name] < sweep[name]


@pytest.mark.parametrize("pattern", ["row", "unstructured", "2:4"])
def test_alps_is_never_worse_than_wandas_mask_refitted(pattern):
    alps, refitted = (errors(p, pattern)[0] for p in (ALPS(), Wanda(refit=True)))
    for name in alps:
        assert alps[name] <= refitted[name] * (1 + 1e-9)


def test_errors_are_known_where_the_gram_matrix_is():
    for pruner in (SparseGPT(), ALPS(), Wanda(refit=True), RI(swap=True)):
        assert all(error is not None for error in errors(pruner)[1])
    for pruner in (Magnitude(), Wanda(), RI(), RIA()):
        assert errors(pruner)[1] == [None] * 3


@pytest.mark.parametrize("pattern", ["row", "2:4"])
def test_the_error_of_a_convolution_is_that_of_its_outputs(pattern):
    conv, x = nn.Conv2d(4, 6, 3, stride=2, padding=1).double(), torch.randn(2, 4, 7, 6).double()
    old = conv.weight.detach().clone()
    result = prunus.prune(
        nn.Sequential(conv),
        "sparsegpt",
        layers=["0"],
        sparsity=0.5,
        pattern=pattern,
        calibration=prunus.Calibration([x]),
    )
    by_hand = output_error(input_rows(conv, x), old, conv.weight.detach())
    assert result.rows[0].error == pytest.approx(by_hand, rel=1e-8)
    assert "output error" in str(result)


@pytest.mark.parametrize(
    "pruner", [*LEARNERS, SparseGPT(refit=True), RI(swap=True, refit=True)], ids=str
)
def test_sparsity_zero_leaves_the_weights_bitwise(pruner):
    model, data = deep(), prunus.Calibration(list(correlated(300, 48).split(100)))
    result = prunus.prune(model, pruner, layers=["*"], sparsity=0, calibration=data)
    assert same(model, deep_state())
    assert all(not row.error for row in result.rows)


def test_sparsegpt_changes_the_weights_that_stay():
    model, data = deep(), prunus.Calibration(list(correlated(300, 48).split(100)))
    result = prunus.prune(model, "sparsegpt", sparsity=0.5, calibration=data)
    for name, mask in result.masks.items():
        new, old = model.get_parameter(name)[mask], deep_state()[name][mask]
        assert float((new != old).double().mean()) > 0.9


# rows on several ranks


def _lost(how, pruner):
    model = wrapped(net(), how)
    data = prunus.Calibration(split_batches(4))
    arguments = {"sparsity": 0.45, "pattern": "row", "layers": "*"}
    result = prunus.prune(model, pruner, calibration=data, **arguments)
    return {row.name: row.zeros for row in result.rows}, {
        row.name: row.error for row in result.rows
    }


@pytest.mark.parametrize("pruner", ["sparsegpt", "alps"])
def test_rows_lose_as_much_wherever_they_lie(ranks, pruner):
    zeros, errors = _lost("plain", pruner)
    for its_zeros, its_errors in ranks(_lost, "fsdp", pruner):
        assert its_zeros == zeros
        # ALPS ends when the masks of its rows stand still, of which each rank has others
        assert its_errors == pytest.approx(errors, rel=0.02 if pruner == "alps" else 1e-8)


# traps


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.body = nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 20, bias=False)

    def forward(self, x):
        return self.lm_head(self.body(self.embed(x)))


@pytest.mark.parametrize("exclude", ["lm_head", ["lm_head*"], ["re:.*head"]])
@pytest.mark.parametrize("pruner", LEARNERS, ids=NAMES)
def test_an_excluded_head_stays(pruner, exclude):
    model = Language()
    before = snapshot(model)
    data = prunus.Calibration([torch.arange(20).reshape(2, 10)])
    result = prunus.prune(
        model, pruner, layers=["*"], exclude=exclude, sparsity=0.5, calibration=data
    )
    assert [row.name for row in result.rows] == ["body"]
    assert torch.equal(model.lm_head.weight, before["lm_head.weight"])
    assert not torch.equal(model.body.weight, before["body.weight"])


@pytest.mark.parametrize("pruner", LEARNERS, ids=NAMES)
def test_inputs_of_four_dimensions_are_those_of_the_flat_ones(pruner):
    x, results = torch.randn(2, 3, 4, 8, dtype=torch.float64), []
    state = snapshot(nn.Linear(8, 6).double())
    for shape in ((2, 3, 4, 8), (24, 8)):
        model = nn.Sequential(nn.Linear(8, 6).double())
        model[0].load_state_dict(state)
        data = prunus.Calibration([x.reshape(shape)])
        prunus.prune(model, pruner, layers=["0"], sparsity=0.5, calibration=data)
        results.append(model[0].weight.detach())
    close(*results)


def test_the_windows_of_swin_are_measured():
    timm = pytest.importorskip("timm")
    model = timm.models.SwinTransformer(
        img_size=16,
        patch_size=2,
        window_size=4,
        embed_dim=8,
        depths=(1, 1),
        num_heads=(1, 2),
        num_classes=3,
    )
    data = prunus.Calibration([torch.randn(2, 3, 16, 16)])
    result = prunus.prune(model, "sparsegpt", sparsity=0.5, calibration=data)
    assert result.sparsity == 0.5
    assert all(0 < row.error < 1 for row in result.rows)


class Reaches(nn.Module):
    def __init__(self):
        super().__init__()
        self.near, self.far = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.near(x)


@pytest.mark.parametrize("pruner", LEARNERS, ids=NAMES)
@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "the calibration data is empty; nothing was pruned"),
        ([torch.ones(3, 4)], "no calibration batch reached far; nothing was pruned"),
    ],
)
def test_data_that_tells_nothing_leaves_the_model_untouched(pruner, batches, message):
    model = Reaches()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        prunus.prune(
            model, pruner, layers=["*"], sparsity=0.5, calibration=prunus.Calibration(batches)
        )
    assert same(model, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("pruner", LEARNERS, ids=NAMES)
def test_inputs_that_are_no_numbers_are_refused_by_the_layers_name(pruner, bad):
    model, x = deep(), correlated(100, 48)
    x[3, 5] = bad
    with pytest.raises(ValueError, match=r"0\.weight has NaN or infinite inputs"):
        prunus.prune(model, pruner, layers=["*"], sparsity=0.5, calibration=prunus.Calibration([x]))
    assert same(model, deep_state())


def test_layers_whose_inputs_have_no_matrix_are_refused_by_name():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.ConvTranspose2d(4, 4, 3))
    before = snapshot(model)
    data = prunus.Calibration([torch.randn(1, 4, 8, 8)])
    for name, message in (
        ("0", r"0 \(Conv2d\): each group of its channels has inputs of its own"),
        ("1", r"1 \(ConvTranspose2d\): inputs of transposed convolutions are not measured"),
    ):
        with pytest.raises(ValueError, match=message):
            prunus.prune(model, "sparsegpt", layers=[name], sparsity=0.5, calibration=data)
    assert same(model, before)


def few_and_many(samples, cols=96, rows=48):
    """Weights, `samples` inputs of a decaying spectrum, and as many new ones as tell."""
    g = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(cols, cols, generator=g, dtype=torch.float64))
    spectrum = torch.arange(1, cols + 1, dtype=torch.float64) ** -0.5
    w = 0.05 * torch.randn(rows, cols, generator=g, dtype=torch.float64)
    seen, new = (
        torch.randn(n, cols, generator=g, dtype=torch.float64) * spectrum @ q
        for n in (samples, 4096)
    )
    return w, seen, new


def error_on_new_inputs(pruner, samples):
    w, seen, new = few_and_many(samples)
    model = nn.Sequential(nn.Linear(96, 48, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(w)
    prunus.prune(model, pruner, layers=["0"], pattern="2:4", calibration=prunus.Calibration([seen]))
    return output_error(new, w, model[0].weight.detach())


@pytest.mark.parametrize("samples", [24, 48, 96, 192])
def test_a_refit_on_few_inputs_does_not_raise_the_error_on_new_ones(samples):
    assert error_on_new_inputs(Wanda(refit=True), samples) < error_on_new_inputs(Wanda(), samples)
    sweep, refitted = (error_on_new_inputs(SparseGPT(refit=r), samples) for r in (False, True))
    assert refitted < sweep
    assert error_on_new_inputs(ALPS(), samples) < error_on_new_inputs(Wanda(), samples)
    assert error_on_new_inputs(Wanda(swap=True), samples) < error_on_new_inputs(Wanda(), samples)


@pytest.mark.parametrize("pattern", ["row", "2:4"])
def test_swaps_are_those_of_the_gram_matrix_with_its_ridge(pattern):
    w, seen, _ = few_and_many(48)
    stat, shape = InputGram(96, dtype=torch.float64), parse_pattern(pattern)
    stat.update(seen)
    mask = shape.mask(w.abs(), 48 * 48)
    gram = seen.T @ seen
    ridged = gram + 0.1 * 96 / 48 * gram.diagonal().mean() * torch.eye(96, dtype=torch.float64)
    rounds, group = (100, None) if pattern == "row" else (10, 4)
    expected = swap(w, ridged, mask, rounds, group)
    assert torch.equal(Wanda(swap=True).refine(w, stat, mask, shape), expected)
    assert not torch.equal(swap(w, gram, mask, rounds, group), expected)


@pytest.mark.parametrize("exponent", [-27, 27])
@pytest.mark.parametrize(
    "pruner", [ALPS(iterations=30), Wanda(refit=True), Wanda(swap=True)], ids=str
)
def test_single_precision_results_do_not_depend_on_the_scale(pruner, exponent):
    def pruned(s, x):
        w, seen, _ = few_and_many(64)
        model = nn.Sequential(nn.Linear(96, 48, bias=False))
        with torch.no_grad():
            model[0].weight.copy_(w.float() * s)
        data = prunus.Calibration([seen.float() * x])
        prunus.prune(model, pruner, layers=["0"], pattern="2:4", calibration=data)
        return model[0].weight.detach()

    s = 2.0**exponent
    assert torch.equal(pruned(s, s), pruned(1.0, 1.0) * s)


@pytest.mark.parametrize(("samples", "told"), [(95, True), (96, False)])
def test_fewer_inputs_than_columns_are_told(samples, told, caplog):
    error_on_new_inputs(Wanda(refit=True), samples)
    assert (f"{samples} inputs for 96 columns" in caplog.text) is told
