"""N:M packing equals core torch's, and its metadata is enough to multiply."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass as pack_of_torch,
)

from prunus import formats
from prunus.formats.nm import kept_places


def nm_matrix(rows, cols, n, m, dtype, seed=0, kept=0.8):
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(rows, cols // m, m, generator=generator).argsort(-1)
    mask = (order < n) & (torch.rand(order.shape, generator=generator) < kept)
    values = torch.randint(1, 100, order.shape, generator=generator)
    return (values * mask).reshape(rows, cols).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(("rows", "cols"), [(32, 64), (64, 192), (128, 64)])
def test_packing_equals_core_torch_bit_for_bit(dtype, rows, cols):
    w = nm_matrix(rows, cols, 2, 4, dtype)
    values, meta = formats.pack_cutlass(w)
    expected_values, expected_meta = pack_of_torch(w)
    assert torch.equal(values, expected_values)
    assert torch.equal(meta, expected_meta)


@pytest.mark.parametrize(("rows", "cols"), [(32, 16), (64, 48)])
def test_one_of_two_in_float32_equals_core_torch_too(rows, cols):
    w = nm_matrix(rows, cols, 1, 2, torch.float32)
    assert all(map(torch.equal, formats.pack_cutlass(w), pack_of_torch(w)))


def test_every_group_of_four_is_packed_as_core_torch_does():
    masks = [[v >> i & 1 for i in range(4)] for v in range(16) if v.bit_count() <= 2]
    w = torch.tensor([masks[(i * 7 + i // 11) % 11] for i in range(32 * 16)])
    w = (w * torch.tensor([1, 2, 3, 4])).reshape(32, 64).to(torch.float16)
    assert all(map(torch.equal, formats.pack_cutlass(w), pack_of_torch(w)))


def test_published_size_of_two_of_four():
    half = nm_matrix(32, 64, 2, 4, torch.float16)
    assert formats.encode(half, "2:4").bits / (16 * half.numel()) == 0.5625
    byte = nm_matrix(32, 64, 2, 4, torch.int8)
    assert formats.encode(byte, "2:4").bits / (8 * byte.numel()) == 0.625


@settings(max_examples=50, deadline=None)
@given(
    nm=st.sampled_from([(1, 2), (2, 4), (1, 4), (4, 8), (3, 5), (2, 16), (7, 20)]),
    rows=st.integers(1, 5),
    groups=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_multiplexing_equals_the_dense_product(nm, rows, groups, seed):
    n, m = nm
    w = nm_matrix(rows, groups * m, n, m, torch.float64, seed)
    stored = formats.encode(w, f"{n}:{m}")
    assert torch.equal(stored.decode(), w)
    x = torch.randn(3, groups * m, dtype=torch.float64)
    torch.testing.assert_close(stored.multiply(x), x @ w.T)


def test_places_are_ascending_and_those_of_the_values():
    masks = np.random.default_rng(0).random((500, 8)) < 0.3
    masks = masks[masks.sum(1) <= 4]
    places = kept_places(masks, 4)
    assert (np.diff(places.astype(int), axis=1) > 0).all()
    for mask, place in zip(masks, places, strict=True):
        assert set(np.flatnonzero(mask)) <= set(place)


def test_a_tile_can_be_read():
    w = torch.tensor([[0.0, 1.5, 0.0, -2.0, 3.0, 0.0, 0.0, 0.0]])
    text = formats.show_tile(formats.encode(w, "2:4"))
    assert text.splitlines()[1].split() == [
        *(".", "1.50", ".", "-2.00", "3.00", ".", ".", ".", "|"),
        *("1.50", "-2.00", "3.00", "0.00", "|", "01", "11", "00", "10"),
    ]


@pytest.mark.parametrize(
    ("w", "message"),
    [
        (torch.zeros(32, 32, dtype=torch.float64), "take no 2:4 matrix of torch.float64"),
        (torch.zeros(30, 32, dtype=torch.float16), "multiples of 32x32"),
        (torch.zeros(16, 16, dtype=torch.int8), "multiples of 16x64"),
        (torch.ones(32, 32, dtype=torch.float16), "no 2:4 matrix"),
    ],
)
def test_what_tensor_cores_do_not_take_is_refused(w, message):
    with pytest.raises(ValueError, match=message):
        formats.pack_cutlass(w)
