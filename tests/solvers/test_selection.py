import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.solvers import selection as solvers
from prunus.solvers.selection import keep_all_but_lowest

from tests.oracles.pruning import global_keep, lowest, nm_keep

# few distinct values, so that ties are everywhere
VALUES = st.sampled_from([-math.inf, -1.5, -0.0, 0.0, 1e-30, 0.25, 0.5, 1.0, 3e38, math.inf])
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


@st.composite
def score_lists(draw):
    lists = draw(st.lists(st.lists(VALUES, max_size=12), min_size=1, max_size=4))
    dtype = draw(DTYPES)
    return [torch.tensor(values, dtype=dtype) for values in lists]


@given(score_lists(), st.data())
@settings(deadline=None)
def test_kth_lowest_is_the_kth_of_the_sorted_list(tensors, data):
    size = sum(t.numel() for t in tensors)
    k = data.draw(st.integers(1, size)) if size else 0
    if k:
        expected = sorted(float(x) for t in tensors for x in t)[k - 1]
        assert solvers.kth_lowest(tensors, k) == expected


@given(score_lists(), st.data())
@settings(deadline=None)
def test_count_lowest_gives_ties_to_the_first_tensor(tensors, data):
    size = sum(t.numel() for t in tensors)
    k = data.draw(st.integers(0, size))
    here, everywhere = solvers.count_lowest(tensors, k)
    expected = [int((~keep).sum()) for keep in global_keep(tensors, k)]
    assert here == everywhere == expected


@given(score_lists(), st.data())
@settings(deadline=None)
def test_exactly_k_go_and_of_equal_scores_the_first(tensors, data):
    scores = tensors[0]
    k = data.draw(st.integers(0, scores.numel()))
    expected = global_keep([scores], k)[0]
    assert torch.equal(solvers.keep_all_but_lowest(scores, k), expected)
    with mock.patch.object(solvers, "FEW", -1):  # large tensors go another way
        assert torch.equal(solvers.keep_all_but_lowest(scores, k), expected)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(2, 8), st.data())
@settings(deadline=None)
def test_groups_keep_their_n_highest(rows, groups, m, data):
    n = data.draw(st.integers(1, m - 1))
    entries = rows * groups * m
    values = data.draw(st.lists(VALUES, min_size=entries, max_size=entries))
    scores = torch.tensor(values).reshape(rows, groups * m)
    assert torch.equal(solvers.keep_highest_of_groups(scores, n, m), nm_keep(scores, n, m))


DTYPES_IN_TURN = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("m", range(2, 65))
def test_groups_of_every_size_keep_as_sorting_does(m):
    """Few distinct values, so that ties are everywhere, and zeros of both signs."""
    values = torch.tensor([-1.0, -0.0, 0.0, 0.5, 2.0, math.inf])
    scores = torch.cat([torch.randn(8, 3 * m), values[torch.randint(6, (8, 3 * m))]])
    for n in range(1, m):
        given = scores.to(DTYPES_IN_TURN[(n + m) % 4])
        groups = given.reshape(-1, m)
        order = groups.sort(dim=1, stable=True).indices  # of equal ones the first are lowest
        expected = torch.zeros(groups.shape, dtype=torch.bool).scatter_(1, order[:, m - n :], True)
        keep = solvers.keep_highest_of_groups(given, n, m)
        assert torch.equal(keep.reshape(-1, m), expected), n


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_groups_are_looked_at_in_chunks(chunk):
    scores = torch.randint(3, (5, 48)).float()
    for n, m in ((1, 16), (13, 16), (2, 12), (12, 24)):
        expected = nm_keep(scores, n, m)
        with mock.patch.object(solvers, "CHUNK", chunk):
            assert torch.equal(solvers.keep_highest_of_groups(scores, n, m), expected)


@pytest.mark.parametrize("m", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("groups", [1, 3])
def test_a_rank_without_rows_has_empty_masks(groups, m):
    scores = torch.empty(0, groups * m)
    assert solvers.keep_highest_of_groups(scores, 1, m).shape == scores.shape
    assert solvers.keep_all_but_lowest_of_rows(scores, 1).shape == scores.shape
    none = torch.empty(0, dtype=torch.int64)
    assert solvers.keep_all_but_lowest_of_each(scores, none).shape == scores.shape


@given(st.integers(1, 5), st.integers(1, 8), DTYPES, st.data())
@settings(deadline=None)
def test_each_row_loses_as_many_as_it_is_told(rows, cols, dtype, data):
    values = data.draw(st.lists(VALUES, min_size=rows * cols, max_size=rows * cols))
    counts = data.draw(st.lists(st.integers(0, cols), min_size=rows, max_size=rows))
    scores = torch.tensor(values, dtype=dtype).reshape(rows, cols)
    expected = torch.ones(rows, cols, dtype=torch.bool)
    for r, (row, k) in enumerate(zip(scores.tolist(), counts, strict=True)):
        expected[r, list(lowest(row, k))] = False
    assert torch.equal(solvers.keep_all_but_lowest_of_each(scores, torch.tensor(counts)), expected)
    for k in set(counts):
        once = solvers.keep_all_but_lowest_of_rows(scores, k)
        many = solvers.keep_all_but_lowest_of_each(scores, torch.full((rows,), k))
        assert torch.equal(once, many)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_selection_is_exact_across_chunks(dtype):
    scores = torch.randn(3, solvers.CHUNK // 2 + 7).to(dtype)
    flat = scores.reshape(-1)
    for k in (1, 17, flat.numel() // 2, flat.numel() - 1):
        order = flat.sort(stable=True).indices
        expected = torch.ones_like(flat, dtype=torch.bool)
        expected[order[:k]] = False
        assert torch.equal(solvers.keep_all_but_lowest(scores, k), expected.view_as(scores))


def test_non_finite_entries_are_counted():
    t = torch.zeros(10)
    assert solvers.count_non_finite(t) == 0
    t[3], t[4], t[5] = float("nan"), float("inf"), -float("inf")
    assert solvers.count_non_finite(t) == 3
    assert solvers.count_non_finite(torch.full((4,), 60000.0, dtype=torch.float16)) == 0
    assert solvers.count_non_finite(torch.full((4,), 3e38)) == 0  # the sum overflows, they do not


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_among_transposed_scores_go_to_the_first_of_a_row(dtype):
    scores = torch.randint(3, (6, 5), generator=torch.Generator().manual_seed(0)).to(dtype)
    for k in range(1, 30):
        assert torch.equal(
            keep_all_but_lowest(scores.T.contiguous().T, k), keep_all_but_lowest(scores, k)
        )
