"""The sweep over columns, beside the published loop over single columns."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.core.patterns import parse_pattern
from prunus.pruners._stripes import choice, row_counts, stripe_counts
from prunus.solvers import column_sweep
from prunus.solvers.column_sweep import (
    errors_by_columns,
    errors_by_solving,
    sweep_columns,
    upper_factor,
)
from prunus.solvers.column_sweep_numpy import Groups
from prunus.solvers.selection import keep_all_but_lowest, keep_highest_of_groups

from tests.oracles.pruning import close, lowest, nm_keep
from tests.oracles.second_order import column_loop, group_solve, inverse, quadratic
from tests.oracles.second_order import upper_factor as slow_upper_factor

FEW = settings(deadline=None, max_examples=25)
SEEDS = st.integers(0, 99)


def problem(rows, cols, seed=0, damp=1e-2):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
    x = torch.randn(cols + 5, cols, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(cols, cols, generator=generator, dtype=torch.float64)
    h = x.T @ x / len(x)
    return w, h + damp * h.diagonal().mean() * torch.eye(cols, dtype=torch.float64)


def half(scores, begin, end):
    return keep_all_but_lowest(scores, scores.numel() // 2)


def n_of(n, m):
    return lambda scores, begin, end: keep_highest_of_groups(scores, n, m)


def given_mask(keep):
    return lambda scores, begin, end: keep[:, begin:end]


def loss(h, dw):
    return sum(quadratic(h, row) for row in dw)


@given(st.integers(1, 40), SEEDS)
@FEW
def test_the_factor_is_that_of_the_inverse(cols, seed):
    _, h = problem(1, cols, seed)
    u = upper_factor(h)
    assert torch.equal(u, u.triu())
    close(u, slow_upper_factor(h), 1e-7)
    close(u.T @ u @ h, torch.eye(cols, dtype=torch.float64))


@given(st.integers(1, 12), SEEDS)
@FEW
def test_rows_of_the_factor_are_first_rows_of_inverses_of_what_is_left(cols, seed):
    _, h = problem(1, cols, seed)
    u = upper_factor(h)
    for j in range(cols):
        close(u[j, j] * u[j, j:], inverse(h[j:, j:].contiguous())[0], 1e-7)


@given(st.integers(1, 5), st.integers(1, 12), SEEDS, st.data())
@FEW
def test_the_errors_of_a_panel_are_those_of_the_loop(rows, cols, seed, data):
    w, h = problem(rows, cols, seed)
    u = upper_factor(h)
    masks = st.lists(st.booleans(), min_size=w.numel(), max_size=w.numel())
    drop = torch.tensor(data.draw(masks)).reshape(w.shape)
    new, _, expected = column_loop(w, u, given_mask(~drop), cols)
    for solve in (errors_by_columns, errors_by_solving):
        wt = w.T.clone(memory_format=torch.contiguous_format)
        errors = torch.full_like(wt, torch.nan)
        solve(wt, u, drop.T, errors)
        close(wt.T.masked_fill(drop, 0), new)
        assert bool((errors.T[~drop] == 0).all())
        assert float(errors.square().sum()) / 2 == pytest.approx(expected)


# 300 columns: two whole stripes and a part, of which the last panel is a part
@pytest.mark.parametrize("cols", [1, 20, 32, 128, 129, 300])
def test_the_sweep_equals_the_published_loop(cols):
    w, h = problem(6, cols)
    u = upper_factor(h)
    mine, keep = sweep_columns(w, u, half)
    theirs, their_keep, _ = column_loop(w, u, half, column_sweep.STRIPE)
    assert torch.equal(keep, their_keep)
    close(mine, theirs, 1e-7)
    assert bool((mine[~keep] == 0).all())


# 40 and 48 are above a panel and no multiple of it
@pytest.mark.parametrize(
    ("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 3), (16, 32), (20, 40), (12, 48), (100, 256)]
)
def test_groups_are_chosen_from_weights_that_know_of_all_errors_before(n, m):
    w, h = problem(3, 512 // m * m)
    u = upper_factor(h)
    mine, keep = sweep_columns(w, u, n_of(n, m), m)
    theirs, their_keep, _ = column_loop(w, u, n_of(n, m), m)
    assert bool((keep.view(3, -1, m).sum(2) == n).all())
    assert torch.equal(keep, their_keep)
    close(mine, theirs, 1e-6)


@pytest.mark.parametrize("stripe", [4, 12, 128])
@pytest.mark.parametrize("panel", [1, 2, 4, 32])
def test_groups_do_not_depend_on_panels_and_stripes(stripe, panel):
    w, h = problem(5, 40)
    u = upper_factor(h)
    expected, their_keep = sweep_columns(w, u, n_of(2, 4), 4)
    with mock.patch.multiple(column_sweep, STRIPE=stripe, PANEL=panel):
        mine, keep = sweep_columns(w, u, n_of(2, 4), 4)
    assert torch.equal(keep, their_keep)
    close(mine, expected)


@pytest.mark.parametrize("panel", [1, 5, 20, 64])
def test_the_result_does_not_depend_on_how_many_columns_are_solved_at_once(panel):
    w, h = problem(5, 200)
    u = upper_factor(h)
    keep = half(torch.randn(w.shape, dtype=torch.float64), 0, 0)
    expected, _ = sweep_columns(w, u, given_mask(keep))
    with mock.patch.object(column_sweep, "PANEL", panel):
        mine, _ = sweep_columns(w, u, given_mask(keep))
    close(mine, expected, 1e-8)


def test_keeping_all_leaves_the_weights_bitwise_and_keeping_none_is_zero():
    w, h = problem(4, 150)
    u = upper_factor(h)
    assert torch.equal(sweep_columns(w, u, given_mask(torch.ones_like(w).bool()))[0], w)
    assert torch.equal(
        sweep_columns(w, u, given_mask(torch.zeros_like(w).bool()))[0], torch.zeros_like(w)
    )


def test_a_diagonal_matrix_moves_no_survivor():
    w, h = problem(4, 150)
    new, keep = sweep_columns(w, upper_factor(h.diagonal().diag()), half)
    assert torch.equal(new, w.where(keep, 0))


def test_columns_and_weights_are_left_as_they_were_given():
    w, h = problem(4, 40)
    before = w.clone(), h.clone()
    sweep_columns(w, upper_factor(h), half)
    assert torch.equal(w, before[0])
    assert torch.equal(h, before[1])


@given(st.permutations(range(6)), SEEDS)
@FEW
def test_rows_in_another_order_give_the_same_rows(order, seed):
    w, h = problem(6, 20, seed)
    u = upper_factor(h)
    for choose, every in ((half, 128), (n_of(2, 4), 4)):
        new, keep = sweep_columns(w, u, choose, every)
        again, again_keep = sweep_columns(w[order], u, choose, every)
        assert torch.equal(again_keep, keep[order])
        close(again, new[order], 1e-8)


@given(st.integers(1, 5), st.integers(1, 12), SEEDS)
@FEW
def test_the_loss_is_half_the_sum_of_the_squared_errors(rows, cols, seed):
    w, h = problem(rows, cols, seed)
    u = upper_factor(h)
    new, _ = sweep_columns(w, u, half)
    *_, expected = column_loop(w, u, half, 128)
    assert loss(h, new - w) == pytest.approx(expected, rel=1e-8)


@given(st.integers(1, 3), st.integers(1, 10), SEEDS)
@FEW
def test_the_sweep_never_beats_the_exact_solve_for_its_mask(rows, cols, seed):
    w, h = problem(rows, cols, seed)
    new, keep = sweep_columns(w, upper_factor(h), half)
    c = inverse(h)
    for old, row, kept in zip(w, new, keep, strict=True):
        best = group_solve(c, old, (~kept).nonzero().squeeze(1).tolist())
        assert quadratic(h, row - old) >= quadratic(h, best - old) * (1 - 1e-9)


@given(st.integers(1, 10), SEEDS, st.data())
@FEW
def test_where_the_first_columns_go_the_sweep_is_the_exact_solve(cols, seed, data):
    w, h = problem(2, cols, seed)
    k = data.draw(st.integers(0, cols))
    keep = (torch.arange(cols) >= k).expand(2, cols)
    new, _ = sweep_columns(w, upper_factor(h), given_mask(keep))
    for old, row in zip(w, new, strict=True):
        close(row, group_solve(inverse(h), old, list(range(k))), 1e-7)


@pytest.mark.parametrize("seed", range(5))
def test_the_sweep_loses_less_than_zeroing_does_with_the_same_mask(seed):
    # true of the rows together; no theorem: a single row can lose more
    w, h = problem(32, 64, seed)
    for choose, every in ((half, 128), (n_of(2, 4), 4)):
        new, keep = sweep_columns(w, upper_factor(h), choose, every)
        assert loss(h, new - w) < 0.7 * loss(h, w.where(keep, 0) - w)


@given(st.integers(1, 6), st.integers(1, 500), st.floats(0, 1), st.floats(0, 0.9), SEEDS)
@FEW
def test_counts_of_the_stripes_add_up_zeros_included(rows, cols, sparsity, zeros, seed):
    generator = torch.Generator().manual_seed(seed)
    w = (torch.rand(rows, cols, generator=generator) >= zeros).float()
    parts = [w[:, : cols // 3], w[:, cols // 3 :]]
    dead = w.numel() - int(w.count_nonzero())
    drop = max(dead, round(sparsity * w.numel()))
    counts = stripe_counts(parts, drop, lambda t: t)
    assert sum(map(sum, counts)) == drop
    share = (drop - dead) / max(1, w.numel() - dead)
    for part, each in zip(parts, counts, strict=True):
        for stripe, count in zip(part.split(column_sweep.STRIPE, 1), each, strict=True):
            alive = int(stripe.count_nonzero())
            assert 0 <= count - (stripe.numel() - alive) <= alive
            assert abs(count - (stripe.numel() - alive) - alive * share) <= 1


def test_counts_of_the_stripes_add_up_in_a_layer_of_45_million_weights():
    w = torch.ones(1).expand(4096, 11008)
    drop = round(0.6 * w.numel())
    for count in (drop, drop + 1, drop + 2):
        assert sum(map(sum, stripe_counts([w], count, lambda t: t))) == count


@given(st.integers(1, 6), st.integers(1, 400), st.floats(0, 1), st.floats(0, 0.9), SEEDS)
@FEW
def test_counts_of_the_rows_add_up_in_each_row_zeros_included(rows, cols, sparsity, zeros, seed):
    generator = torch.Generator().manual_seed(seed)
    w = (torch.rand(rows, cols, generator=generator) >= zeros).float()
    dead = (w == 0).sum(1)
    drop = max(rows * int(dead.max()), round(sparsity * w.numel()))
    counts = row_counts(w, drop)
    each, more = divmod(drop, rows)
    for i in range(rows):
        assert sum(int(count[i]) for count in counts) == each + (i < more)
        share = (each + (i < more) - int(dead[i])) / max(1, cols - int(dead[i]))
        for stripe, count in zip(w[i].split(column_sweep.STRIPE), counts, strict=True):
            alive = int(stripe.count_nonzero())
            fresh = int(count[i]) - (len(stripe) - alive)
            assert 0 <= fresh <= alive
            assert abs(fresh - alive * share) <= 1


def test_a_row_that_lost_too_much_before_loses_no_more():
    w = torch.ones(3, 200)
    w[1, :150] = 0
    assert [sum(int(count[i]) for count in row_counts(w, 301)) for i in range(3)] == [101, 150, 100]


@given(
    st.sampled_from(["unstructured", "row", "1:4"]),
    st.integers(1, 4),
    st.sampled_from([4, 8, 12]),
    SEEDS,
)
@FEW
def test_masks_of_a_stripe_take_zeros_first_then_useless_columns_then_low_scores(
    pattern, rows, cols, seed
):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(rows, cols, generator=generator, dtype=torch.float64) + 0.1
    alive = torch.rand(rows, cols, generator=generator) >= 0.2
    useless = torch.rand(cols, generator=generator) < 0.2
    ranked = torch.where(alive, torch.where(useless, 0.0, scores), -1.0)
    ks = torch.randint(cols + 1, (rows,), generator=generator)
    if pattern == "1:4":
        counts, expected = [], nm_keep(ranked, 1, 4)
    elif pattern == "row":
        gone = [lowest(row.tolist(), int(k)) for row, k in zip(ranked, ks, strict=True)]
        counts = [ks]
        expected = torch.tensor([[j not in each for j in range(cols)] for each in gone])
    else:
        gone, counts = lowest(ranked.flatten().tolist(), int(ks.sum())), [int(ks.sum())]
        expected = torch.tensor([i not in gone for i in range(rows * cols)]).reshape(rows, cols)
    before = scores.clone()
    choose, every = choice(parse_pattern(pattern), alive, useless, counts, keep_all_but_lowest)
    assert every == (4 if pattern == "1:4" else column_sweep.STRIPE)
    assert torch.equal(choose(scores, 0, cols), expected & alive)
    assert torch.equal(scores, before)


def test_later_stripes_are_chosen_by_their_own_columns():
    generator = torch.Generator().manual_seed(0)
    alive, useless = torch.ones(2, 200).bool(), torch.zeros(200).bool()
    alive[0, 130], useless[140] = False, True
    scores = torch.rand(2, 72, generator=generator) + 0.1
    plan = [torch.tensor([0, 0]), torch.tensor([2, 1])]
    choose, _ = choice(parse_pattern("row"), alive, useless, plan, keep_all_but_lowest)
    gone = (~choose(scores, 128, 200)).nonzero().tolist()
    assert gone == [[0, 2], [0, 12], [1, 12]]


@FEW
@given(SEEDS, st.sampled_from([(2, 4), (1, 4), (4, 8), (3, 5), (1, 2), (16, 32), (20, 40)]))
def test_groups_swept_in_numpy_are_those_of_the_general_sweep(seed, pattern):
    n, m = pattern
    w, h = problem(7, 4 * m, seed)
    if seed % 2:  # many equal weights, so that the first of them must go
        w = w.sign()
    alive, useless = w != 0, torch.zeros(4 * m, dtype=torch.bool)
    if seed % 3 == 1:  # some pruned before, some without inputs
        alive, useless[::5] = torch.rand(w.shape, generator=torch.manual_seed(seed)) < 0.7, True
        w = w * alive
    u, groups = upper_factor(h), Groups(n, m, alive, useless)
    fast, fast_keep = sweep_columns(w, u, groups, m)
    slow, slow_keep = sweep_columns(w, u, lambda *args: groups(*args), m)
    assert torch.equal(fast_keep, slow_keep)
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-12)
