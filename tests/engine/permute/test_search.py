"""The search for column orders, beside a sort for each pair and beside all orders there are."""

import itertools
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.engine.permute import search
from prunus.engine.permute.search import SEARCHES, assign, assign_lane, gains, reallocate, retained

from tests.oracles.pruning import nm_keep

FEW = settings(deadline=None, max_examples=25)
SEEDS = st.integers(0, 99)
PATTERNS = [(1, 4), (2, 4), (4, 8), (1, 2), (3, 4)]
patterns = pytest.mark.parametrize(("n", "m"), PATTERNS)
layers = given(st.integers(1, 9), st.integers(1, 7), st.sampled_from(PATTERNS), SEEDS)


def layer(rows, cols, seed=0, dtype=torch.float64):
    """Importances of columns of very different scale, one of them zero."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, cols, generator=generator, dtype=torch.float64).abs()
    scores *= torch.rand(cols, generator=generator, dtype=torch.float64).exp2() ** 4
    scores[:, int(torch.randint(cols, (), generator=generator))] = 0
    return scores.to(dtype)


def any_order(cols, seed=0):
    return torch.randperm(cols, generator=torch.Generator().manual_seed(seed))


def slow_retained(scores, n, m):
    return float(scores.double()[nm_keep(scores, n, m)].sum())


def slow_gains(scores, perm, lane, n, m):
    """Sort the M columns of every group with every column of the lane."""
    scores = scores.double()[:, perm]
    groups = len(perm) // m
    score = torch.empty(groups, groups, dtype=torch.float64)
    for g, k in itertools.product(range(groups), repeat=2):
        group = scores[:, g * m : (g + 1) * m].clone()
        group[:, lane] = scores[:, k * m + lane]
        score[g, k] = group.sort(dim=1, descending=True).values[:, :n].sum()
    return score


def dealt(perm, lane, m, order):
    """`perm` with column order[g] of the lane in group g."""
    moved = perm.view(-1, m).clone()
    moved[:, lane] = perm.view(-1, m)[list(order), lane]
    return moved.flatten()


def is_permutation(perm, cols):
    return perm.dtype == torch.int64 and sorted(perm.tolist()) == list(range(cols))


@given(st.integers(1, 8), st.integers(1, 8), SEEDS)
@FEW
def test_largest_is_a_sort_cut_off(count, n, seed):
    columns = layer(count, 12, seed)
    best = search.largest(columns.unbind(0), n)
    expected = columns.sort(dim=0, descending=True).values[:n]
    assert torch.equal(torch.stack(best), expected)


@layers
@FEW
def test_what_is_retained_is_what_the_mask_keeps(rows, groups, pattern, seed):
    n, m = pattern
    scores, perm = layer(rows, groups * m, seed), any_order(groups * m, seed)
    assert retained(scores, n, m) == pytest.approx(slow_retained(scores, n, m), rel=1e-12)
    assert retained(scores, n, m, perm) == retained(scores[:, perm], n, m)


def test_sums_in_order_are_dealt_in_a_snake():
    assert reallocate(torch.arange(6.0).unsqueeze(0), 1, 3).tolist() == [0, 3, 4, 1, 2, 5]
    scores = torch.arange(1.0, 9).repeat(3, 1)
    assert reallocate(scores, 2, 4).tolist() == [0, 3, 4, 7, 1, 2, 5, 6]
    shuffled = torch.tensor([5, 0, 7, 2, 1, 6, 3, 4])
    scores = scores[:, shuffled]
    assert scores[0, reallocate(scores, 2, 4)].tolist() == [1, 4, 5, 8, 2, 3, 6, 7]


@patterns
@pytest.mark.parametrize("lane", [0, -1])
def test_gains_equal_a_sort_for_each_pair(n, m, lane):
    lane %= m
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        scores, perm = layer(50, 6 * m, dtype=dtype), any_order(6 * m)
        mine = gains(scores, perm, lane, n, m)
        assert mine.dtype == torch.float64
        torch.testing.assert_close(
            mine, slow_gains(scores, perm, lane, n, m), rtol=tolerance, atol=0
        )


@layers
@FEW
def test_gains_do_not_depend_on_how_many_rows_are_looked_at_in_one_go(rows, groups, pattern, seed):
    n, m = pattern
    scores, perm = layer(rows, groups * m, seed), any_order(groups * m, seed)
    expected = slow_gains(scores, perm, 1, n, m)
    for entries in (1, 2 * groups, 1000):
        with mock.patch.object(search, "IN_CACHE", entries):
            torch.testing.assert_close(gains(scores, perm, 1, n, m), expected, rtol=1e-12, atol=0)
            assert retained(scores, n, m) == pytest.approx(slow_retained(scores, n, m), rel=1e-12)


def test_single_precision_does_not_drift_over_many_rows():
    scores, perm = layer(60_000, 8, dtype=torch.float32), any_order(8)
    mine = gains(scores, perm, 2, 2, 4)
    torch.testing.assert_close(mine, slow_gains(scores, perm, 2, 2, 4), rtol=1e-6, atol=0)
    assert retained(scores, 2, 4) == pytest.approx(retained(scores.double(), 2, 4), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_are_taken_for_what_they_are(dtype):
    scores, perm = layer(40, 16, dtype=dtype), any_order(16)
    mine = gains(scores, perm, 0, 2, 4)
    torch.testing.assert_close(mine, slow_gains(scores, perm, 0, 2, 4), rtol=1e-6, atol=0)
    assert torch.equal(assign(scores, 2, 4), assign(scores.float(), 2, 4))


@layers
@FEW
def test_gains_are_what_is_retained_after_the_move(rows, groups, pattern, seed):
    n, m = pattern
    scores, perm = layer(rows, groups * m, seed), any_order(groups * m, seed)
    score = gains(scores, perm, m - 1, n, m)
    order = any_order(groups, seed + 1)
    moved = dealt(perm, m - 1, m, order)
    expected = retained(scores, n, m, moved)
    assert float(score[torch.arange(groups), order].sum()) == pytest.approx(expected, rel=1e-12)


@given(st.integers(1, 9), st.integers(1, 5), st.sampled_from(PATTERNS), SEEDS)
@settings(deadline=None, max_examples=15)
def test_a_lane_is_dealt_as_well_as_any_way_of_dealing_it(rows, groups, pattern, seed):
    n, m = pattern
    scores, perm = layer(rows, groups * m, seed), any_order(groups * m, seed)
    lane = seed % m
    new = assign_lane(scores, perm, lane, n, m)
    best = max(
        slow_retained(scores[:, dealt(perm, lane, m, order)], n, m)
        for order in itertools.permutations(range(groups))
    )
    assert retained(scores, n, m, new) == pytest.approx(best, rel=1e-12)
    others = [i for i in range(m) if i != lane]
    assert torch.equal(new.view(-1, m)[:, others], perm.view(-1, m)[:, others])


@layers
@FEW
def test_what_is_retained_never_falls_from_lane_to_lane(rows, groups, pattern, seed):
    n, m = pattern
    for dtype in (torch.float32, torch.float64):
        scores, perm = layer(rows, groups * m, seed, dtype), any_order(groups * m, seed)
        before = retained(scores, n, m, perm)
        for lane in range(m):
            perm = assign_lane(scores, perm, lane, n, m)
            after = retained(scores, n, m, perm)
            assert after >= before
            before = after


@layers
@FEW
def test_every_search_gives_one_permutation_whatever_the_memory_order(rows, groups, pattern, seed):
    n, m = pattern
    scores = layer(rows, groups * m, seed)
    before = scores.clone()
    for name, find in SEARCHES.items():
        perm = find(scores, n, m)
        assert is_permutation(perm, groups * m), name
        assert torch.equal(perm, find(scores.T.contiguous().T, n, m)), name
    assert torch.equal(scores, before)


@layers
@FEW
def test_assignment_keeps_at_least_what_its_start_keeps(rows, groups, pattern, seed):
    n, m = pattern
    scores, start = layer(rows, groups * m, seed), any_order(groups * m, seed)
    before = start.clone()
    assert retained(scores, n, m, assign(scores, n, m, start)) >= retained(scores, n, m, start)
    assert torch.equal(start, before)
    dealt_first = retained(scores, n, m, reallocate(scores, n, m))
    assert retained(scores, n, m, assign(scores, n, m)) >= dealt_first


@patterns
def test_each_search_keeps_more_than_the_one_before_where_scales_differ(n, m):
    scores = layer(64, 16 * m)
    scores = scores[:, scores.sum(0).argsort()]  # all that matters lies together
    orders = [torch.arange(16 * m), reallocate(scores, n, m), assign(scores, n, m)]
    kept = [retained(scores, n, m, perm) for perm in orders]
    assert kept[0] < kept[1] < kept[2]


@patterns
def test_an_assignment_that_keeps_no_more_is_not_taken(n, m):
    start, order = any_order(4 * m), torch.arange(4).flip(0).numpy()
    with mock.patch.object(search, "linear_sum_assignment", return_value=(None, order)):
        assert torch.equal(assign(torch.zeros(3, 4 * m), n, m, start), start)


@patterns
def test_a_single_group_has_nothing_to_gain(n, m):
    scores = layer(5, m)
    assert torch.equal(assign(scores, n, m, any_order(m)), any_order(m))


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (5, 4), (1, 1)])
def test_patterns_that_prune_nothing_or_all_or_do_not_fit_are_refused(n, m):
    with pytest.raises(ValueError, match=f"n={n} of m={m}.*n must be from 1 to m - 1"):
        assign(layer(2, 8), n, m)
    with pytest.raises(ValueError, match="m=3 does not divide 8 columns; choose a divisor of 8"):
        reallocate(layer(2, 8), 1, 3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("find", [*SEARCHES.values(), retained])
def test_scores_that_are_not_finite_are_refused(find, bad):
    scores = layer(2, 8)
    scores[1, 3] = bad
    with pytest.raises(ValueError, match="scores holds 1 entries that are NaN or infinite"):
        find(scores, 2, 4)


@pytest.mark.parametrize("perm", [[0, 1, 2, 3], [0, 0, 1, 2, 3, 4, 5, 6]])
def test_a_start_that_is_no_permutation_is_refused(perm):
    with pytest.raises(ValueError, match="does not hold each of 8 columns once"):
        assign(layer(2, 8), 2, 4, torch.tensor(perm))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_the_same_permutation():
    scores = layer(64, 32)
    for find in SEARCHES.values():
        perm = find(scores.cuda(), 2, 4)
        assert perm.is_cuda
        assert torch.equal(perm.cpu(), find(scores, 2, 4))
