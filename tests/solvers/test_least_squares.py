"""Refits beside least squares row by row."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunus.solvers import least_squares as refitting
from prunus.solvers.column_sweep import sweep_columns, upper_factor
from prunus.solvers.least_squares import layer_error, refit, relative_error
from prunus.solvers.selection import keep_all_but_lowest_of_rows, keep_highest_of_groups

from tests.oracles.gram_layers import DTYPES, FEW, SEEDS, error, layer, problem, slack


def row_solve(row, gram, keep):
    """The kept weights by least squares on the square root of the Gram matrix."""
    values, vectors = torch.linalg.eigh(gram)
    root = values.clamp(min=0).sqrt().unsqueeze(1) * vectors.T
    new = torch.zeros_like(row)
    new[keep] = torch.linalg.pinv(root[:, keep]) @ root @ row
    return new


def sparsegpt(w, gram, choose, every=128):
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return sweep_columns(w, upper_factor(damped), lambda scores, begin, end: choose(scores), every)


def half(scores):
    return keep_all_but_lowest_of_rows(scores, scores.shape[1] // 2)


def two_of_four(scores):
    return keep_highest_of_groups(scores, 2, 4)


@given(st.integers(1, 4), st.integers(1, 9), SEEDS)
@FEW
def test_the_error_is_a_trace_and_its_share_that_of_zero_weights(rows, cols, seed):
    w, gram, mask = problem(rows, cols, seed)
    new = w * mask
    whole = float(((new - w) @ gram @ (new - w).T).trace())
    assert float(layer_error(w, new, gram).sum()) == pytest.approx(whole)
    assert relative_error(w, new, gram) == pytest.approx(whole / float((w @ gram @ w.T).trace()))
    assert relative_error(w, torch.zeros_like(w), gram) == pytest.approx(1)
    assert relative_error(w, new, torch.zeros_like(gram)) == 0


@given(st.integers(1, 5), st.integers(1, 12), st.integers(1, 30), SEEDS, st.data())
@FEW
def test_enough_iterations_equal_the_exact_row_solve(rows, cols, samples, seed, data):
    dead = data.draw(st.integers(0, cols - 1))
    w, gram, mask = problem(rows, cols, seed, samples, dead=dead)
    # conjugate gradients need some condition to get there (seed 99, 4 x 10, of 6 samples)
    gram += 1e-4 * gram.diagonal().mean() * torch.eye(cols, dtype=gram.dtype)
    new = refit(w, torch.zeros_like(w), gram, mask, 20 * cols)
    best = torch.stack([row_solve(r, gram, k) for r, k in zip(w, mask, strict=True)])
    scale = float(error(w, gram, torch.zeros_like(w)).max())
    torch.testing.assert_close(
        error(w, gram, new), error(w, gram, best), rtol=1e-6, atol=1e-7 * scale + 1e-300
    )


@given(st.integers(1, 5), st.integers(1, 12), SEEDS, st.integers(0, 30), DTYPES, st.data())
@FEW
def test_refit_never_raises_the_error_nor_changes_the_support(
    rows, cols, seed, iterations, dtype, data
):
    samples, dead = data.draw(st.integers(1, 20)), data.draw(st.integers(0, cols))
    w, gram, mask = (t.to(dtype) for t in problem(rows, cols, seed, samples, 0.2, dead))
    mask = mask.bool()
    start = torch.randn(w.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    new = refit(w, start, gram, mask, iterations)
    assert bool((new[~mask] == 0).all())
    masked = torch.where(mask, start, 0)
    assert bool((error(w, gram, new) <= error(w, gram, masked) + slack(w, gram)).all())
    assert torch.equal(new[:, gram.diagonal() == 0], masked[:, gram.diagonal() == 0])


def test_each_iteration_of_refit_lowers_the_error():
    w, gram = layer(48, 0)
    mask = half(w.square())
    errors = torch.stack([error(w, gram, refit(w, w, gram, mask, k)) for k in range(12)])
    assert bool((errors.diff(dim=0) < 0).all())


@pytest.mark.parametrize("iterations", [5, 20, 1000])
def test_refit_in_single_precision_does_not_diverge_where_the_gram_is_nearly_singular(iterations):
    w, _, mask = problem(20, 60)
    q, _ = torch.linalg.qr(torch.randn(60, 60, dtype=torch.float64, generator=torch.manual_seed(1)))
    gram = q * torch.logspace(0, -8, 60, dtype=torch.float64) @ q.T
    single = refit(w.float(), w.float(), gram.float(), mask, iterations).double()
    double = refit(w, w, gram, mask, iterations)
    assert bool((error(w, gram, single) <= error(w, gram, w * mask)).all())
    assert float(single.abs().max()) < 100 * float(w.abs().max())
    lost = relative_error(w, single, gram) - relative_error(w, double, gram)
    assert lost < 0.05 * relative_error(w, w * mask, gram)


@pytest.mark.parametrize("iterations", [20, 1000])
def test_refit_takes_no_steps_along_noise_where_the_gram_is_singular(iterations):
    w, _, mask = problem(20, 60)
    x = torch.randn(5, 60, dtype=torch.float64, generator=torch.manual_seed(0))
    single = refit(w.float(), w.float(), (x.T @ x).float(), mask, iterations).double()
    # five inputs, some thirty weights: the outputs can be met exactly, by many weights
    assert relative_error(w, single, x.T @ x) < 1e-10
    assert float(single.abs().max()) < 10


def test_rows_that_got_worse_or_lost_their_numbers_are_returned_as_they_came():
    w, gram, mask = problem(3, 10)
    wrong = torch.tensor([[0.0], [100.0], [torch.nan]], dtype=torch.float64)
    solved, masked = refit(w, w, gram, mask), w * mask
    real = refitting._conjugate_gradients
    with mock.patch.object(refitting, "_conjugate_gradients", lambda *args: real(*args) + wrong):
        new = refit(w, w, gram, mask)
    assert torch.equal(new, torch.stack([solved[0], masked[1], masked[2]]))


def test_a_row_whose_squares_overflow_is_solved():
    w = torch.tensor([[1.0, 1.0, 1.0], [1e38, 1e38, 1e38]])
    gram = 2 * torch.eye(3) + torch.ones(3, 3)
    mask = torch.tensor([[True, True, False]]).expand(2, 3)
    new = refit(w, w, gram, mask)
    torch.testing.assert_close(new[1], torch.tensor([1.25e38, 1.25e38, 0.0]))
    torch.testing.assert_close(new[0], torch.tensor([1.25, 1.25, 0.0]))


@pytest.mark.parametrize("exponent", [-27, -9, 9, 27])  # about 1e-8 to 1e8
@pytest.mark.parametrize("of", ["weights", "inputs", "both"])
def test_single_precision_refits_do_not_depend_on_the_scale(exponent, of):
    w, gram, mask = (t.float() for t in problem(6, 30, samples=20))
    s, x = (2.0 ** (exponent * (of in (part, "both"))) for part in ("weights", "inputs"))
    plain = refit(w, w, gram, mask.bool(), 20, 0.1)
    assert torch.equal(refit(w * s, w * s, gram * x**2, mask.bool(), 20, 0.1), plain * s)


@given(st.integers(1, 5), st.integers(1, 12), st.integers(1, 30), SEEDS, st.floats(1e-3, 1e3))
@FEW
def test_a_ridge_is_that_of_ridge_regression_toward_the_dense_weights(
    rows, cols, samples, seed, ridge
):
    w, gram, mask = problem(rows, cols, seed, samples)
    damped = gram + ridge * gram.diagonal().mean() * torch.eye(cols, dtype=gram.dtype)
    best = torch.stack([row_solve(r, damped, k) for r, k in zip(w, mask, strict=True)])
    new = refit(w, w, gram, mask, 20 * cols, ridge)
    torch.testing.assert_close(new, best, rtol=1e-5, atol=1e-6 * float(w.abs().max()))


def test_the_ridge_grows_with_columns_over_samples():
    assert refitting.ridge_of(256, 256) == pytest.approx(0.1)
    assert refitting.ridge_of(64, 256) == pytest.approx(0.4)
    assert refitting.ridge_of(262144, 4096) < 0.002
    assert refitting.ridge_of(0, 256) == pytest.approx(25.6)


def test_refit_keeping_all_is_bitwise_and_keeping_none_is_zero():
    w, gram, _ = problem(5, 30)
    every = torch.ones_like(w).bool()
    assert torch.equal(refit(w, w, gram, every), w)
    assert torch.equal(refit(w, w, gram, ~every), torch.zeros_like(w))


@pytest.mark.parametrize("chunk", [1, 30, 70, 1 << 20])
def test_rows_refit_the_same_in_chunks_and_arguments_stay(chunk):
    w, gram, mask = problem(7, 30)
    before = w.clone(), gram.clone(), mask.clone()
    # a few iterations: later ones blow up what rounding makes of other chunks
    expected = refit(w, w, gram, mask, 3)
    with mock.patch.object(refitting, "CHUNK", chunk):
        torch.testing.assert_close(refit(w, w, gram, mask, 3), expected)
    assert all(torch.equal(*pair) for pair in zip((w, gram, mask), before, strict=True))


@pytest.mark.parametrize("seed", range(3))
def test_refit_lowers_the_error_of_the_column_sweep(seed):
    w, gram = layer(128, seed)
    for choose, every in ((half, 128), (two_of_four, 4)):
        new, mask = sparsegpt(w, gram, choose, every)
        assert relative_error(w, refit(w, new, gram, mask), gram) < 0.7 * relative_error(
            w, new, gram
        )


@pytest.mark.parametrize("seed", range(3))
def test_wanda_with_refit_beats_the_column_sweep_at_two_of_four(seed):
    w, gram = layer(128, seed)
    new, _ = sparsegpt(w, gram, two_of_four, 4)
    mask = two_of_four(w.square() * gram.diagonal())
    assert relative_error(w, refit(w, w, gram, mask), gram) <= relative_error(w, new, gram)
