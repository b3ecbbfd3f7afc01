"""The fast paths of selection beside the slow answers they must equal."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.solvers import selection as solvers

from tests.oracles.pruning import global_keep

VALUES = [-math.inf, -1.5, -0.0, 0.0, 0.25, 0.5, 1.0, math.inf]  # few, so that ties are everywhere
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@given(st.integers(0, 6), st.integers(1, 12), st.sampled_from(DTYPES), st.data())
@settings(deadline=None)
def test_each_row_loses_its_k_lowest_and_of_equal_ones_the_first(rows, cols, dtype, data):
    entries = st.lists(st.sampled_from(VALUES), min_size=rows * cols, max_size=rows * cols)
    scores = torch.tensor(data.draw(entries), dtype=dtype).reshape(rows, cols)
    k = data.draw(st.integers(0, cols))
    keep = solvers.keep_all_but_lowest_of_rows(scores, k)
    assert keep.shape == scores.shape
    for row, mask in zip(scores, keep, strict=True):
        assert torch.equal(mask, global_keep([row], k)[0])


def test_chunks_of_rows_give_what_all_rows_at_once_do(monkeypatch):
    scores = torch.rand(7, 12).mul(4).round()
    expected = solvers.keep_all_but_lowest_of_rows(scores, 5)
    monkeypatch.setattr(solvers, "CHUNK", 24)
    assert torch.equal(solvers.keep_all_but_lowest_of_rows(scores, 5), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_of_what_is_kept_leaves_out_dead_units(monkeypatch, dtype):
    monkeypatch.setattr(solvers, "CHUNK", 5)
    scores = torch.tensor([[1.0, 2.0, -math.inf], [4.0, 8.0, -math.inf]], dtype=dtype)
    keep = torch.tensor([[True, False, False], [True, True, False]])
    assert solvers.total_kept(scores, keep) == 13


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_flipped_bits_are_ordered_as_the_floats_and_flip_back(dtype):
    floats = {torch.int16: torch.float16, torch.int32: torch.float32, torch.int64: torch.float64}
    bits = torch.linspace(-3, 3, 101, dtype=floats[dtype]).view(dtype)
    keys = solvers._flip(bits)
    assert bool((keys.diff() > 0).all())
    assert torch.equal(solvers._flip(keys), bits)
