"""The splitting beside its textbook form, and beside what one solve after the mask reaches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.solvers import admm
from prunus.solvers.admm import solve, support
from prunus.solvers.column_sweep import sweep_columns, upper_factor
from prunus.solvers.least_squares import refit, relative_error
from prunus.solvers.selection import (
    keep_all_but_lowest,
    keep_all_but_lowest_of_rows,
    keep_highest_of_groups,
)

from tests.oracles.gram_layers import layer

FEW = settings(deadline=None, max_examples=25)
SEEDS = st.integers(0, 99)


def per_layer(scores):
    return keep_all_but_lowest(scores, round(0.6 * scores.numel()))


def per_row(scores):
    return keep_all_but_lowest_of_rows(scores, round(0.7 * scores.shape[1]))


def two_of_four(scores):
    return keep_highest_of_groups(scores, 2, 4)


PATTERNS = [per_layer, per_row, two_of_four]


def problem(rows, cols, seed=0, samples=None, dead=0):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
    x = torch.randn(samples or cols + 5, cols, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(cols, cols, generator=generator, dtype=torch.float64)
    x[:, :dead] = 0
    return w, x.T @ x


def total_error(w, gram, new):
    return float(((new - w) @ gram @ (new - w).T).trace())


def textbook(w, gram, first, project, iterations, damp):
    """As the paper writes it, but for the first penalty; columns of weights, inverses in full."""
    h = gram + damp * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    e = h.diagonal().rsqrt().diag()
    h, w_hat = e @ h @ e, torch.linalg.inv(e) @ w.T
    rho, v, d = admm.FIRST_PENALTY, torch.zeros_like(w_hat), w_hat * first.T
    before = first.T
    for t in range(iterations):
        eye = torch.eye(len(h), dtype=h.dtype)
        new = torch.linalg.inv(h + rho * eye) @ (h @ w_hat - v + rho * d)
        keep = project((new + v / rho).square().T).T
        d = (new + v / rho) * keep
        v = v + rho * (new - d)
        if t % 3 == 2:
            changed = int((keep != before).sum())
            if changed == 0:
                break
            if changed > 0.1 * int(keep.sum()):
                rho *= 1.3
            elif changed > 0.005 * int(keep.sum()):
                rho *= 1.2
            else:
                rho *= 1.1
            before = keep
    return (e @ d).T, keep.T


@pytest.mark.parametrize("project", PATTERNS)
@pytest.mark.parametrize("iterations", [1, 3, 10, 300])
def test_the_splitting_is_that_of_the_paper(project, iterations):
    w, gram = problem(6, 16)
    first = project(w.square() * gram.diagonal())
    mine, keep = support(w, gram, first, project, iterations, 0.01)
    theirs, their_keep = textbook(w, gram, first, project, iterations, 0.01)
    assert torch.equal(keep, their_keep)
    torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("project", PATTERNS)
def test_the_search_ends_before_its_limit_once_the_support_stands_still(project):
    w, gram = layer(64, 0)
    calls = []
    solve(w, gram, lambda scores: calls.append(scores) or project(scores), 300)
    assert len(calls) < 150


@given(st.integers(1, 5), SEEDS, st.sampled_from(PATTERNS), st.integers(0, 30), st.data())
@FEW
def test_the_solution_is_never_worse_than_a_refit_of_the_first_mask(
    rows, seed, project, iterations, data
):
    w, gram = problem(rows, 12, seed, data.draw(st.integers(1, 30)), data.draw(st.integers(0, 12)))
    new, mask = solve(w, gram, project, iterations, data.draw(st.sampled_from([0.0, 0.01])))
    first = project(w.square() * gram.diagonal())
    limit = total_error(w, gram, refit(w, w, gram, first))
    assert total_error(w, gram, new) <= limit * (1 + 1e-9) + 1e-9
    assert bool((new[~mask] == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masks_have_the_pattern_exactly(dtype):
    w, gram = (t.to(dtype) for t in layer(64, 1))
    _, mask = solve(w, gram, two_of_four)
    assert bool((mask.view(64, -1, 4).sum(2) == 2).all())
    _, mask = solve(w, gram, per_row)
    assert bool((mask.sum(1) == 64 - round(0.7 * 64)).all())
    _, mask = solve(w, gram, per_layer)
    assert int(mask.sum()) == 64 * 64 - round(0.6 * 64 * 64)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_zeros_that_were_there_stay_and_arguments_too(pattern):
    w, gram = layer(64, 2)
    w = w.masked_fill(torch.rand(w.shape, generator=torch.manual_seed(0)) < 0.3, 0)
    alive = w != 0
    before = w.clone(), gram.clone()
    new, mask = solve(w, gram, lambda scores: pattern(scores.where(alive, -1)) & alive)
    assert not bool(mask[~alive].any())
    assert bool((new[~alive] == 0).all())
    assert torch.equal(w, before[0])
    assert torch.equal(gram, before[1])


@pytest.mark.parametrize("project", PATTERNS)
def test_the_first_mask_and_its_weights_are_the_answer_for_a_diagonal_gram(project):
    w, gram = problem(6, 16)
    gram = gram.diagonal().diag()
    first = project(w.square() * gram.diagonal())
    new, mask = solve(w, gram, project)
    assert torch.equal(mask, first)
    torch.testing.assert_close(new, w * first)


@pytest.mark.parametrize("seed", range(3))
def test_seventy_percent_cost_less_than_the_column_sweep_with_a_refit(seed):
    w, gram = layer(128, seed)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(128, dtype=gram.dtype)
    for project, every in ((per_row, 128), (two_of_four, 4)):
        new, mask = sweep_columns(w, upper_factor(damped), lambda s, b, e, p=project: p(s), every)
        theirs = relative_error(w, refit(w, new, gram, mask), gram)
        assert relative_error(w, solve(w, gram, project)[0], gram) < 0.9 * theirs


def test_single_precision_finds_masks_as_good():
    w, gram = layer(128, 3)
    for project in PATTERNS:
        double, _ = solve(w, gram, project)
        single, _ = solve(w.float(), gram.float(), project)
        ratio = relative_error(w, single.double(), gram) / relative_error(w, double, gram)
        assert 0.95 < ratio < 1.05
