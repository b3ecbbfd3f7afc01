"""Huffman codes are optimal, prefix-free, and come back."""

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from prunus import formats
from prunus.formats.huffman import canonical_codes, code_lengths


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 15), max_size=400))
def test_any_text_comes_back(symbols):
    text = np.array(symbols, np.int64)
    stored = formats.Huffman.encode(text, 16)
    assert (stored.decode() == text).all()
    assert stored.bits == formats.huffman_bits(np.bincount(text, minlength=16))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=2, max_size=12))
def test_no_code_begins_another_and_none_is_wasted(counts):
    counts = np.array(counts)
    lengths = code_lengths(counts)
    used = np.flatnonzero(counts)
    codes = canonical_codes(lengths)
    words = [f"{codes[i]:0{lengths[i]}b}" for i in used]
    assert not any(b.startswith(a) for a, b in itertools.permutations(words, 2))
    if len(used) > 1:
        assert sum(0.5 ** lengths[used]) == 1


def test_lengths_are_optimal():
    # the textbook example: Cormen et al., section 16.3
    counts = np.array([45, 13, 12, 16, 9, 5])
    assert int((counts * code_lengths(counts)).sum()) == 224


def test_codes_are_within_a_bit_of_the_entropy():
    rng = np.random.default_rng(0)
    text = np.minimum(rng.geometric(0.3, 50_000) - 1, 15)
    share = np.bincount(text, minlength=16) / len(text)
    entropy = -(share[share > 0] * np.log2(share[share > 0])).sum()
    stored = formats.Huffman.encode(text, 16)
    assert entropy <= stored.stream_bits / len(text) < entropy + 0.1
    assert (stored.decode() == text).all()


def test_hopelessly_long_codes_are_refused():
    counts = np.array([1, 1] + [2**i for i in range(1, 30)])
    with pytest.raises(ValueError, match="too long; use fewer symbols"):
        code_lengths(counts)
