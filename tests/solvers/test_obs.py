"""Elimination in batches of blocks, beside one block after the other."""

import itertools
import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.solvers import obs as elimination
from prunus.solvers.cholesky import inverse
from prunus.solvers.obs import (
    first_order_step,
    greedy_losses,
    greedy_losses_of_groups,
    group_solve,
    increases,
    saliency,
)
from prunus.solvers.selection import keep_highest_of_groups

from tests.oracles.second_order import (
    cap_groups_keep,
    cap_increases,
    cap_losses,
    cap_trace,
    eliminate,
    group_loss,
    least_loss,
    obs_group_scores,
    obs_scores,
    obs_update,
    quadratic,
)
from tests.oracles.second_order import fisher as slow_fisher
from tests.oracles.second_order import group_solve as slow_group_solve

FEW = settings(deadline=None, max_examples=25)
SEEDS = st.integers(0, 99)
TIGHT = {"rtol": 1e-9, "atol": 1e-12}


def problem(n, d, seed, zeros=0.0, damp=1e-2):
    """Fisher matrices of gradients times the present mask, their inverses, and weights."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, d, generator=generator, dtype=torch.float64)
    w[torch.rand(n, d, generator=generator) < zeros] = 0
    g = torch.randn(n, d + 3, d, generator=generator, dtype=torch.float64)
    g = g @ torch.randn(d, d, generator=generator, dtype=torch.float64) * (w != 0).unsqueeze(1)
    f = torch.stack([slow_fisher(list(block), damp) for block in g])
    return f, inverse(f), w


def gone_of(keep):
    return (~keep).nonzero().squeeze(1).tolist()


def drawn_keep(data, n, d):
    masks = st.lists(st.booleans(), min_size=n * d, max_size=n * d)
    return torch.tensor(data.draw(masks), dtype=torch.bool).reshape(n, d)


@given(st.integers(1, 4), st.integers(1, 16), SEEDS, st.sampled_from([0, 0.3, 1]), st.data())
@FEW
def test_losses_equal_the_slow_trace_whatever_the_panel(n, d, seed, zeros, data):
    _, c, w = problem(n, d, seed, zeros)
    expected = torch.stack([cap_losses(*block) for block in zip(c, w, strict=True)])
    with mock.patch.object(elimination, "PANEL", data.draw(st.integers(1, 17))):
        torch.testing.assert_close(greedy_losses(c.clone(), w), expected, **TIGHT)


def test_losses_of_blocks_longer_than_a_panel_equal_the_slow_trace():
    _, c, w = problem(2, elimination.PANEL * 2 + 5, 0)
    expected = torch.stack([cap_losses(*block) for block in zip(c, w, strict=True)])
    torch.testing.assert_close(greedy_losses(c.clone(), w), expected, rtol=1e-8, atol=1e-10)


@given(st.integers(1, 12), SEEDS, st.sampled_from([0, 0.3]))
@FEW
def test_the_group_solve_equals_the_elimination_trace(d, seed, zeros):
    f, c, w = problem(1, d, seed, zeros)
    order, _, trace = cap_trace(c[0], w[0])
    dead = gone_of(w[0] != 0)
    for k, expected in enumerate(trace, 1):
        keep = torch.ones(1, d, dtype=torch.bool)
        keep[0, order[:k] + dead] = False
        torch.testing.assert_close(group_solve(f, w, keep)[0], expected, rtol=1e-12, atol=1e-12)


@given(st.integers(2, 10), SEEDS, st.data())
@FEW
def test_the_group_solve_equals_elimination_in_any_order(d, seed, data):
    f, c, w = problem(1, d, seed)
    order = data.draw(st.permutations(range(d)))[: data.draw(st.integers(1, d))]
    keep = torch.ones(1, d, dtype=torch.bool)
    keep[0, order] = False
    expected = eliminate(c[0], w[0], order)
    torch.testing.assert_close(group_solve(f, w, keep)[0], expected, rtol=1e-11, atol=1e-12)


@given(st.integers(1, 4), st.integers(1, 12), SEEDS, st.data())
@FEW
def test_the_group_solve_equals_the_formula_for_blocks_that_keep_different_numbers(
    n, d, seed, data
):
    f, c, w = problem(n, d, seed)
    keep = drawn_keep(data, n, d)
    mine = group_solve(f, w, keep)
    for i in range(n):
        expected = slow_group_solve(c[i], w[i], gone_of(keep[i]))
        torch.testing.assert_close(mine[i], expected, rtol=1e-10, atol=1e-11)
    assert bool((mine[~keep] == 0).all())


def test_a_shifted_block_is_solved_alike_beside_blocks_that_keep_more(caplog):
    g = 1e-4 * torch.randn(5, 20, dtype=torch.float64)  # far from the ones of an identity
    f = (g.T @ g / 5 - 1e-17 * torch.eye(20)).expand(2, 20, 20)
    w, keep = torch.randn(2, 20, dtype=torch.float64), torch.rand(2, 20) > 0.5
    keep[1] = True
    both, alone = group_solve(f, w, keep), group_solve(f[:1], w[:1], keep[:1])
    assert "not positive definite" in caplog.text
    torch.testing.assert_close(both[0], alone[0], rtol=1e-3, atol=1e-3)


def test_the_group_solve_leaves_no_better_weights():
    f, _, w = problem(1, 8, 5)
    keep = torch.tensor([[True, False] * 4])
    best = group_solve(f, w, keep)
    gradient = (f @ (best - w).unsqueeze(2)).squeeze(2)
    assert float(gradient[keep].abs().max()) < 1e-12


@pytest.mark.parametrize("kept", [True, False])
def test_keeping_all_leaves_the_weights_bitwise_and_keeping_none_is_zero(kept):
    f, _, w = problem(3, 7, 0)
    keep = torch.full((3, 7), kept)
    assert torch.equal(group_solve(f, w, keep), w if kept else torch.zeros_like(w))


@given(st.integers(1, 12), SEEDS, st.sampled_from([0, 0.3]))
@FEW
def test_the_loss_of_a_prefix_is_that_of_its_group(d, seed, zeros):
    f, c, w = problem(1, d, seed, zeros)
    losses = greedy_losses(c.clone(), w)[0]
    order = sorted(gone_of(w[0] == 0), key=lambda i: float(losses[i]))
    for k in range(1, len(order) + 1):
        loss = float(losses[order[k - 1]])
        assert loss == pytest.approx(group_loss(c[0], w[0], order[:k]), rel=1e-10)
        step = slow_group_solve(c[0], w[0], order[:k]) - w[0]
        assert loss == pytest.approx(quadratic(f[0], step), rel=1e-9)


@given(st.integers(1, 4), st.integers(1, 16), SEEDS)
@FEW
def test_losses_never_decrease_along_the_order(n, d, seed):
    _, c, w = problem(n, d, seed)
    losses = greedy_losses(c.clone(), w)
    for i in range(n):
        order = cap_trace(c[i], w[i])[0]
        assert bool((losses[i, order].diff() >= 0).all())
        assert float(losses[i].min()) >= 0


@given(st.integers(1, 4), st.integers(1, 16), SEEDS, st.sampled_from([0, 0.3, 1]))
@FEW
def test_increases_equal_the_slow_ones_and_never_fall_along_the_order(n, d, seed, zeros):
    _, c, w = problem(n, d, seed, zeros)
    losses = greedy_losses(c.clone(), w)
    rises = increases(losses)
    expected = torch.stack([cap_increases(*block) for block in zip(c, w, strict=True)])
    torch.testing.assert_close(rises, expected, **TIGHT)
    assert bool((rises.gather(1, losses.argsort(1)).diff() >= 0).all())


@given(st.integers(1, 3), st.integers(1, 7), SEEDS, st.integers(0, 30))
@FEW
def test_convex_losses_have_no_cheaper_prefixes_than_those_of_the_smallest_increases(
    n, d, seed, count
):
    generator = torch.Generator().manual_seed(seed)
    losses = torch.rand(n, d, generator=generator, dtype=torch.float64).sort(1).values.cumsum(1)
    count = min(count, n * d)
    chosen = increases(losses).flatten().argsort()[:count] // d
    mine = sum(float(losses[b, k - 1]) for b, k in enumerate(chosen.bincount(minlength=n)) if k)
    every = itertools.product(range(d + 1), repeat=n)
    sums = (
        sum(float(losses[b, k - 1]) for b, k in enumerate(each) if k)
        for each in every
        if sum(each) == count
    )
    assert mine == pytest.approx(min(sums))


@given(st.integers(1, 16), SEEDS)
@FEW
def test_the_first_to_go_is_that_of_obs_at_its_price(d, seed):
    _, c, w = problem(2, d, seed)
    losses, scores = greedy_losses(c.clone(), w), saliency(c, w)
    assert torch.equal(losses.argmin(1), scores.argmin(1))
    torch.testing.assert_close(losses.amin(1), scores.amin(1))


@given(st.integers(1, 7), SEEDS)
@FEW
def test_the_greedy_never_beats_the_best_subset_and_finds_the_best_single_weight(d, seed):
    f, c, w = problem(1, d, seed)
    losses = greedy_losses(c.clone(), w)[0].sort().values
    assert float(losses[0]) == pytest.approx(least_loss(f[0], w[0], 1))
    for k in range(1, d + 1):
        assert float(losses[k - 1]) >= least_loss(f[0], w[0], k) * (1 - 1e-9)


def test_blocks_of_one_weight_are_obs_without_its_update():
    f, c, w = problem(20, 1, 0)
    torch.testing.assert_close(greedy_losses(c.clone(), w), saliency(c, w))
    torch.testing.assert_close(saliency(c, w), w.square() * f.squeeze(2) / 2)
    keep = torch.arange(20).unsqueeze(1) % 2 == 0
    assert torch.equal(group_solve(f, w, keep), w.where(keep, 0))
    assert torch.equal(first_order_step(c, w, keep), w.where(keep, 0))


def test_a_fisher_near_the_identity_ranks_by_magnitude_and_moves_nothing():
    f, c, w = problem(4, 10, 0, damp=1e12)
    order = w.abs().argsort(1)
    assert torch.equal(greedy_losses(c.clone(), w).argsort(1), order)
    assert torch.equal(saliency(c, w).argsort(1), order)
    keep = w.abs() > 0.5
    torch.testing.assert_close(group_solve(f, w, keep), w.where(keep, 0), rtol=1e-8, atol=1e-8)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(2, 6), SEEDS, st.data())
@FEW
def test_of_each_group_the_greedy_keeps_n_and_its_own_choice(n, groups, m, seed, data):
    kept = data.draw(st.integers(1, m - 1))
    _, c, w = problem(n, groups * m, seed, data.draw(st.sampled_from([0, 0.3, 0.8])))
    with mock.patch.object(elimination, "PANEL", data.draw(st.integers(1, 24))):
        scores = greedy_losses_of_groups(c.clone(), w, kept, m)
    keep = keep_highest_of_groups(scores, kept, m) & (w != 0)
    expected = torch.stack([cap_groups_keep(c[i], w[i], kept, m) for i in range(n)])
    assert torch.equal(keep, expected)
    most = scores.masked_fill(keep, 0).amax(1)
    assert bool((scores.masked_fill(~keep, math.inf).amin(1) > most).all())


def test_choosing_groups_by_the_unstructured_losses_would_be_another_choice():
    _, c, w = problem(8, 16, 0)
    plain = keep_highest_of_groups(greedy_losses(c.clone(), w), 1, 4)
    greedy = keep_highest_of_groups(greedy_losses_of_groups(c.clone(), w, 1, 4), 1, 4)
    assert not torch.equal(plain, greedy)


@given(st.integers(1, 4), st.integers(1, 10), SEEDS, st.data())
@FEW
def test_the_step_of_obs_equals_the_formula(n, d, seed, data):
    _, c, w = problem(n, d, seed)
    keep = drawn_keep(data, n, d)
    for i, mine in enumerate(first_order_step(c, w, keep)):
        torch.testing.assert_close(mine, obs_update(c[i], w[i], gone_of(keep[i])))


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), SEEDS)
@FEW
def test_the_saliency_of_a_group_is_shared_by_its_weights(n, groups, group, seed):
    _, c, w = problem(n, groups * group, seed, 0.3)
    scores = saliency(c, w, group)
    for i in range(n):
        sums = scores[i].view(groups, group).sum(1)
        torch.testing.assert_close(sums, obs_group_scores(c[i], w[i], group))
        if group == 1:
            torch.testing.assert_close(scores[i], obs_scores(c[i], w[i]))
    assert bool((scores[w == 0] == 0).all())


def test_weights_that_the_gradients_say_nothing_of_go_before_all_others():
    f, _, w = problem(1, 6, 0)
    f[0, 2], f[0, :, 2], f[0, 2, 2] = 0, 0, 1e-12
    losses = greedy_losses(inverse(f), w)
    assert int(losses.argmin()) == 2
    assert bool(losses.isfinite().all())
