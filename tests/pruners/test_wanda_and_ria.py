"""Scores by magnitude and the norms of inputs."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunus import RI, RIA, Wanda
from prunus.pruners.ria import relative_importance
from prunus.solvers.selection import keep_all_but_lowest_of_rows
from prunus.stats import InputNorm

from tests.oracles.inputs import FEW, SEEDS, WHOLE, measured, problem, scores
from tests.oracles.layerwise import best_row_mask
from tests.oracles.layerwise import relative_importance as slow_relative_importance
from tests.oracles.pruning import close

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
