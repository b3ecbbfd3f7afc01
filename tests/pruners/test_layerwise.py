"""Wanda, RI, RIA, SparseGPT and ALPS beside slow answers, and the traps of published programs."""

import functools
import itertools
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import prunus
from prunus import ALPS, RI, RIA, Magnitude, SparseGPT, Wanda
from prunus.core.patterns import parse_pattern
from prunus.core.ranks import Ranks
from prunus.pruners.ria import relative_importance
from prunus.solvers import column_sweep
from prunus.solvers.selection import keep_all_but_lowest, keep_all_but_lowest_of_rows
from prunus.stats import InputGram, InputNorm

from tests.distributed.workers import batches as split_batches
from tests.distributed.workers import net, wrapped
from tests.oracles.layerwise import best_row_mask, damped, input_rows, inputs_of, output_error
from tests.oracles.layerwise import relative_importance as slow_relative_importance
from tests.oracles.second_order import column_loop, quadratic
from tests.oracles.second_order import upper_factor as slow_upper_factor

FEW = settings(deadline=None, max_examples=25)
SEEDS = st.integers(0, 99)
WHOLE = Ranks()
DAMP = SparseGPT().damp
LEARNERS = [Wanda(), Wanda(swap=True, refit=True), RIA(), SparseGPT(), ALPS()]
NAMES = ["wanda", "wanda-refit", "ria", "sparsegpt", "alps"]


def close(mine, theirs, tolerance=1e-9):
    torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def problem(rows, cols, seed=0, zeros=0.0, dead=0, samples=None):
    """Weights, some of them zero, and the Gram statistic of correlated inputs, some of them dead."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
    w *= torch.rand(rows, cols, generator=generator) >= zeros
    x = torch.randn(samples or cols + 5, cols, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(cols, cols, generator=generator, dtype=torch.float64)
    x[:, torch.randperm(cols, generator=generator)[:dead]] = 0
    return w, measured(x)


def measured(x):
    stat = InputGram(x.shape[1], dtype=torch.float64)
    stat.update(x)
    return stat


def scores(pruner, w, stat):
    return pruner.scores(w, stat, parse_pattern("unstructured"), WHOLE)


def solve(w, stat, pattern="unstructured", drop=0, pruner=None):
    return (pruner or SparseGPT()).sweep(w, stat, parse_pattern(pattern), drop, WHOLE)


def snapshot(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(model, before):
    return all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


# scores


def test_relative_importance_is_that_of_the_example():
    w = torch.tensor([[1.0, 3.0], [2.0, -2.0]], dtype=torch.float64)
    expected = torch.tensor([[7 / 12, 27 / 20], [7 / 6, 9 / 10]], dtype=torch.float64)
    close(scores(RI(), w, None), expected)


@given(st.integers(1, 5), st.integers(1, 5), st.floats(0, 0.9), SEEDS)
@FEW
def test_relative_importance_is_the_sum_of_two_shares(rows, cols, zeros, seed):
    w, _ = problem(rows, cols, seed, zeros)
    before = w.clone()
    close(relative_importance(w, WHOLE), slow_relative_importance(w))
    assert torch.equal(w, before)


def test_ria_is_relative_importance_times_a_power_of_the_norm():
    w, stat = problem(4, 6)
    for a in (0.5, 1.0, 2.0):
        expected = slow_relative_importance(w) * stat.gram("cpu").diagonal() ** (a / 2)
        close(scores(RIA(a=a), w, stat), expected)


def test_ria_with_exponent_zero_is_ri_dead_inputs_included():
    w, stat = problem(4, 6, dead=2)
    assert torch.equal(scores(RIA(a=0), w, stat), scores(RI(), w, None))


@pytest.mark.parametrize("a", [-0.5, float("inf"), float("nan")])
def test_an_exponent_that_is_none_is_refused(a):
    with pytest.raises(ValueError, match=f"a={a}; an exponent of 0 or more is needed"):
        RIA(a=a)


@pytest.mark.parametrize("pruner", [RI(), RIA(), RIA(a=0), Wanda()])
def test_rows_and_columns_of_zeros_have_finite_scores(pruner):
    w, stat = problem(4, 6, dead=1)
    w[1], w[:, 3] = 0, 0
    found = scores(pruner, w, stat)
    assert bool(found.isfinite().all())
    assert bool((found[1] == 0).all())
    assert bool((found[:, 3] == 0).all())
    assert bool((scores(pruner, torch.zeros_like(w), stat) == 0).all())


def test_wanda_is_the_magnitude_times_the_norm_of_the_input():
    w, stat = problem(3, 5)
    norm = stat.gram("cpu").diagonal().sqrt()
    found = scores(Wanda(), w, stat)
    for i, j in itertools.product(range(3), range(5)):
        assert float(found[i, j]) == pytest.approx(abs(float(w[i, j])) * float(norm[j]))


@given(st.integers(0, 3), st.floats(1e-3, 1e3), SEEDS)
@FEW
def test_the_masks_of_wandas_rows_do_not_change_when_a_row_is_scaled(row, scale, seed):
    w, stat = problem(4, 9, seed)
    scaled = w.clone()
    scaled[row] *= scale
    masks = [keep_all_but_lowest_of_rows(scores(Wanda(), t, stat), 5) for t in (w, scaled)]
    assert torch.equal(*masks)


@given(st.integers(1, 7), st.data(), SEEDS)
@FEW
def test_wandas_row_mask_is_the_best_one_where_inputs_are_uncorrelated(cols, data, seed):
    keep = data.draw(st.integers(0, cols))
    w, stat = problem(2, cols, seed)
    total = stat.gram("cpu").diagonal().diag()
    masks = keep_all_but_lowest_of_rows(scores(Wanda(), w, stat), cols - keep)
    for row, mask in zip(w, masks, strict=True):
        assert torch.equal(mask, best_row_mask(row, total, keep))


def test_norms_and_gram_matrices_give_the_same_scores():
    x = torch.randn(20, 6, dtype=torch.float64)
    w, norm = torch.randn(4, 6, dtype=torch.float64), InputNorm(6)
    norm.update(x)
    for pruner in (Wanda(), RIA()):
        close(scores(pruner, w, norm), scores(pruner, w, measured(x)), 1e-5)


# SparseGPT


def slow_choice(w, stat, pattern, drop):
    """The masks of single stripes: existing zeros go first, then dead inputs, then low scores."""
    dead = stat.gram("cpu").diagonal() == 0
    lowest = keep_all_but_lowest
    if pattern == "row":
        drop, lowest = drop // len(w), keep_all_but_lowest_of_rows
    elif ":" in pattern:
        n, m = map(int, pattern.split(":"))
        drop, lowest = m - n, keep_all_but_lowest_of_rows

    def choose(found, begin, end):
        found = found.masked_fill(dead[begin:end], 0).masked_fill(w[:, begin:end] == 0, -1)
        return lowest(found, drop) & (w[:, begin:end] != 0)

    return choose


@given(
    st.sampled_from(["unstructured", "row", "2:4", "1:4"]),
    st.floats(0, 0.4),
    st.integers(0, 3),
    SEEDS,
)
@FEW
def test_sparsegpt_is_the_published_loop_and_loses_half_its_squared_errors(
    pattern, zeros, dead, seed
):
    w, stat = problem(4, 12, seed, zeros, dead)
    drop = 32 if pattern in ("unstructured", "row") else 0
    before = w.clone(), stat.gram("cpu").clone()
    new, mask = solve(w, stat, pattern, drop)
    h = damped(before[1], stat.count, DAMP)
    every = int(pattern[-1]) if ":" in pattern else 128
    slow, keep, loss = column_loop(
        w, slow_upper_factor(h), slow_choice(w, stat, pattern, drop), every
    )
    assert torch.equal(mask, keep)
    close(new, slow, 1e-7)
    # a dead input makes up for nothing, so in the damped H its weights count like any other
    assert sum(quadratic(h, row) for row in new - w) == pytest.approx(loss, rel=1e-10)
    assert torch.equal(w, before[0])
    assert torch.equal(stat.gram("cpu"), before[1])


def test_dead_inputs_go_first_and_change_no_other_weight():
    w, stat = problem(4, 10, dead=3)
    dead = stat.gram("cpu").diagonal() == 0
    new, mask = solve(w, stat, drop=12)
    assert torch.equal(mask, ~dead.expand_as(w))
    assert torch.equal(new, w * mask)


@pytest.mark.parametrize("pattern", ["unstructured", "row", "2:4"])
def test_uncorrelated_inputs_leave_survivors_as_they_are(pattern):
    x = torch.diag(torch.rand(12, dtype=torch.float64) + 0.5)
    w = torch.randn(5, 12, dtype=torch.float64)
    new, mask = solve(w, measured(x), pattern, 30)
    assert torch.equal(new, w * mask)
    assert not bool(mask.all())


@pytest.mark.parametrize("stripe", [4, 8, 20, 128])
def test_groups_do_not_depend_on_the_stripe(stripe):
    w, stat = problem(5, 40)
    expected = solve(w, stat, "2:4")
    with mock.patch.object(column_sweep, "STRIPE", stripe):
        new, mask = solve(w, stat, "2:4")
    assert torch.equal(mask, expected[1])
    close(new, expected[0])


@given(st.permutations(range(6)), st.sampled_from(["unstructured", "row", "2:4"]), SEEDS)
@FEW
def test_rows_in_another_order_give_the_same_rows(order, pattern, seed):
    w, stat = problem(6, 12, seed)
    new, mask = solve(w, stat, pattern, 36)
    again, again_mask = solve(w[order], stat, pattern, 36)
    assert torch.equal(again_mask, mask[order])
    close(again, new[order], 1e-8)


@pytest.mark.parametrize("cols", [20, 300])
@pytest.mark.parametrize("drop", [0.0, 0.51, 0.9, 1.0])
def test_every_row_loses_the_same_and_the_first_ones_one_more(cols, drop):
    w, stat = problem(6, cols, zeros=0.3)
    drop = round(drop * w.numel()) if drop == 1 else int(drop * 6 * cols)
    drop = max(drop, 6 * int((w == 0).sum(1).max()))
    _, mask = solve(w, stat, "row", drop)
    each, more = divmod(drop, 6)
    assert (~mask).sum(1).tolist() == [each + (i < more) for i in range(6)]
    assert not bool((mask & (w == 0)).any())


@given(st.integers(1, 30), st.sampled_from(["unstructured", "2:4"]), SEEDS)
@FEW
def test_refitting_never_raises_the_error_nor_brings_weights_back(samples, pattern, seed):
    w, stat = problem(4, 12, seed, zeros=0.2, samples=samples)
    new, mask = solve(w, stat, pattern, 24)
    better, its_mask = solve(w, stat, pattern, 24, SparseGPT(refit=True))
    assert torch.equal(mask, its_mask)
    assert bool((better[~mask] == 0).all())
    total = stat.gram("cpu")
    for old, a, b in zip(w, new, better, strict=True):
        assert quadratic(total, b - old) <= quadratic(total, a - old) * (1 + 1e-9) + 1e-12


def test_a_damp_that_is_none_is_refused():
    with pytest.raises(ValueError, match="damp=0; a number above 0 is needed, such as 1e-2"):
        SparseGPT(damp=0)


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
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, padding="same"))
    before = snapshot(model)
    data = prunus.Calibration([torch.randn(1, 4, 8, 8)])
    for name, message in (
        ("0", "0 .Conv2d.: inputs are measured for Linear and ungrouped"),
        ("1", "1: .*numeric"),
    ):
        with pytest.raises(ValueError, match=message):
            prunus.prune(model, "sparsegpt", layers=[name], sparsity=0.5, calibration=data)
    assert same(model, before)
