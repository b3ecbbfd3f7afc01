"""SparseGPT beside its published loop."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunus import SparseGPT
from prunus.solvers import column_sweep
from prunus.solvers.selection import keep_all_but_lowest, keep_all_but_lowest_of_rows

from tests.oracles.inputs import DAMP, FEW, SEEDS, measured, problem, solve
from tests.oracles.layerwise import damped
from tests.oracles.pruning import close
from tests.oracles.second_order import column_loop, quadratic
from tests.oracles.second_order import upper_factor as slow_upper_factor

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
    total = total + 0.1 * 12 / samples * total.diagonal().mean() * torch.eye(12).double()
    for old, a, b in zip(w, new, better, strict=True):
        assert quadratic(total, b - old) <= quadratic(total, a - old) * (1 + 1e-9) + 1e-12


def test_a_damp_that_is_none_is_refused():
    with pytest.raises(ValueError, match="damp=0; a number above 0 is needed, such as 1e-2"):
        SparseGPT(damp=0)
