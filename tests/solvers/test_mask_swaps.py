"""Swaps beside all single swaps tried one by one."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunus.solvers import mask_swaps as swapping
from prunus.solvers.least_squares import relative_error
from prunus.solvers.mask_swaps import swap
from prunus.solvers.selection import keep_all_but_lowest_of_rows, keep_highest_of_groups

from tests.oracles.gram_layers import DTYPES, FEW, SEEDS, error, layer, problem, slack


def half(scores):
    return keep_all_but_lowest_of_rows(scores, scores.shape[1] // 2)


def two_of_four(scores):
    return keep_highest_of_groups(scores, 2, 4)


def best_swap(row, gram, keep, among):
    """The keep-mask and error after the best swap within `among`, by trying them all."""

    def loss(kept):
        gap = torch.where(kept, 0, row)
        return float(gap @ gram @ gap)

    best, least = keep, loss(keep)
    for i in among:
        for j in among:
            if not keep[i] and keep[j] and row[i] != 0:
                trial = keep.clone()
                trial[i], trial[j] = True, False
                if loss(trial) < least - 1e-12:
                    best, least = trial, loss(trial)
    return best, least


@given(st.integers(1, 4), st.integers(1, 10), SEEDS, st.integers(1, 4))
@FEW
def test_swaps_in_rows_are_the_best_of_all(rows, cols, seed, rounds):
    w, gram, mask = problem(rows, cols, seed)
    with mock.patch.object(swapping, "AT_ONCE", 1):
        new = swap(w, gram, mask, rounds)
    for row, keep, mine in zip(w, mask, new, strict=True):
        for _ in range(rounds):
            keep, _ = best_swap(row, gram, keep, range(cols))
        assert torch.equal(mine, keep)


@given(st.integers(1, 3), st.sampled_from([2, 3, 4, 6]), SEEDS, st.integers(1, 3))
@FEW
def test_swaps_in_groups_are_the_best_of_each_group_one_after_the_other(rows, m, seed, rounds):
    w, gram, mask = problem(rows, 12, seed)
    new = swap(w, gram, mask, rounds, m)
    with mock.patch.object(swapping, "STRIPE", 8):
        assert torch.equal(swap(w, gram, mask, rounds, m), new)
    for row, keep, mine in zip(w, mask, new, strict=True):
        for _ in range(rounds):
            for first in range(0, 12, m):
                keep, _ = best_swap(row, gram, keep, range(first, first + m))
        assert torch.equal(mine, keep)


@given(st.integers(1, 4), st.integers(1, 12), SEEDS, st.sampled_from([None, 1, 3, 12]), st.data())
@FEW
def test_no_single_swap_helps_in_the_end(rows, cols, seed, group, data):
    cols = cols if group is None else 12
    dead = data.draw(st.integers(0, cols))
    w, gram, mask = problem(rows, cols, seed, data.draw(st.integers(1, 20)), 0.2, dead)
    new = swap(w, gram, mask, 1000, group)
    for row, keep in zip(w, new, strict=True):
        for part in torch.arange(cols).split(group or cols):
            gap = torch.where(keep, 0, row)
            _, least = best_swap(row, gram, keep, part.tolist())
            assert least == pytest.approx(float(gap @ gram @ gap), rel=1e-6, abs=1e-9)


@given(st.integers(1, 5), SEEDS, st.integers(0, 40), st.sampled_from([None, 4, 8]), DTYPES)
@FEW
def test_swaps_never_raise_the_error_keep_counts_and_wake_no_zeros(
    rows, seed, rounds, group, dtype
):
    w, gram, mask = problem(rows, 40, seed, 30, zeros=0.3, dead=3)
    w, gram = w.to(dtype), gram.to(dtype)
    with mock.patch.multiple(swapping, CANDIDATES=3 if seed % 2 else 32, AT_ONCE=4, STRIPE=16):
        new = swap(w, gram, mask, rounds, group)
    for part in (1, 40) if group is None else (group,):
        shape = (rows, -1, part) if part > 1 else (rows, 1, 40)
        assert torch.equal(new.view(shape).sum(2), mask.view(shape).sum(2))
    assert not bool((new & ~mask & (w == 0)).any())
    assert bool((error(w, gram, w * new) <= error(w, gram, w * mask) + slack(w, gram)).all())


def test_masks_that_are_best_for_a_diagonal_gram_stay():
    w, gram, _ = problem(8, 40)
    scores = w.square() * gram.diagonal()
    for mask, group in ((half(scores), None), (two_of_four(scores), 4)):
        assert torch.equal(swap(w, gram.diagonal().diag(), mask, 20, group), mask)


@pytest.mark.parametrize("seed", range(3))
def test_swaps_lower_the_error_of_wanda(seed):
    w, gram = layer(96, seed)
    scores = w.square() * gram.diagonal()
    for mask, group, share in ((half(scores), None, 0.6), (two_of_four(scores), 4, 0.7)):
        new = swap(w, gram, mask, 50, group)
        assert relative_error(w, w * new, gram) < share * relative_error(w, w * mask, gram)


def test_groups_that_do_not_divide_the_columns_are_refused():
    w, gram, mask = problem(2, 10)
    with pytest.raises(ValueError, match="`group=4` does not divide 10 columns"):
        swap(w, gram, mask, 1, 4)


@pytest.mark.parametrize("chunk", [1, 30, 70, 1 << 20])
def test_rows_swap_the_same_in_chunks_and_arguments_stay(chunk):
    w, gram, mask = problem(7, 30)
    before = w.clone(), gram.clone(), mask.clone()
    expected = swap(w, gram, mask, 50)
    with mock.patch.object(swapping, "CHUNK", chunk):
        assert torch.equal(swap(w, gram, mask, 50), expected)
    swap(w, gram, mask, 5, 3)
    assert all(torch.equal(*pair) for pair in zip((w, gram, mask), before, strict=True))
