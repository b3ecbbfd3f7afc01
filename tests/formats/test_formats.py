"""Formats give back what they were given, and count their bits exactly."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from prunus import formats
from prunus.formats.bits import bits_for, pack_bits, unpack_bits

LOSSLESS = ("dense", "bitmask", "csr", "csc")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8)


def sparse(shape, density=0.3, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(1, 100, shape, generator=generator)
    return (values * (torch.rand(shape, generator=generator) < density)).to(dtype)


@pytest.mark.parametrize("form", LOSSLESS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_gives_back_what_was_encoded(form, dtype):
    w = sparse((12, 20), dtype=dtype)
    stored = formats.encode(w, form)
    assert torch.equal(stored.decode(), w)
    assert stored.decode().dtype == dtype


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from([*LOSSLESS, "2x4", "4:4", "eie"]),
    rows=st.integers(0, 6),
    cols=st.integers(0, 5),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_any_shape_comes_back_and_its_size_is_known_beforehand(form, rows, cols, density, seed):
    w = sparse((2 * rows, 4 * cols), density, seed=seed).sign()
    stored = formats.encode(w, form)
    assert torch.equal(stored.decode(), w)
    assert stored.bits == formats.sizes(w, (form,))[form]


@pytest.mark.parametrize("form", [*LOSSLESS, "4x3", "eie"])
def test_convolution_weights_and_vectors_keep_their_shape(form):
    w = sparse((8, 3, 3, 3)).sign()
    assert torch.equal(formats.encode(w, form).decode(), w)
    if form != "4x3":
        v = sparse((9,)).sign()
        assert torch.equal(formats.encode(v, form).decode(), v)


def test_float8_is_stored():
    w = sparse((8, 8)).to(torch.float8_e4m3fn)
    for form in LOSSLESS:
        assert torch.equal(formats.encode(w, form).decode().float(), w.float())


def test_minus_zero_is_a_zero():
    w = torch.tensor([[-1.0, 2.0]]) * torch.tensor([[0.0, 1.0]])
    assert torch.signbit(w[0, 0])
    assert len(formats.encode(w, "csr").values) == 1


@pytest.mark.parametrize(
    ("form", "bits"),
    [
        ("dense", 32 * 64 * 48),
        ("bitmask", 64 * 48 + 32 * 300),
        ("csr", 300 * (32 + 6) + 32 * 65),
        ("csc", 300 * (32 + 6) + 32 * 49),
    ],
)
def test_sizes_are_those_of_the_formulas(form, bits):
    w = torch.zeros(64 * 48)
    w[torch.randperm(64 * 48)[:300]] = 1.0
    w = w.reshape(64, 48)
    stored = formats.encode(w, form)
    assert stored.bits == sum(stored.parts().values()) == bits
    assert math.ceil(bits / 8) <= stored.nbytes <= bits / 8 + 2


def test_block_size_counts_blocks():
    w = torch.zeros(8, 32)
    w[5, 9] = w[6, 11] = w[0, 31] = 1.0
    stored = formats.encode(w, "4x4")
    assert stored.parts() == {"pointers": 3 * 32, "indices": 2 * 3, "values": 2 * 16 * 32}


@pytest.mark.parametrize("form", ["bitmask", "csr", "4x4", "2:4", "eie"])
def test_what_a_file_holds_is_enough(form):
    w = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]] * 2)
    stored = formats.encode(w, form)
    again = formats.restore(stored.name, stored.tensors(), stored.options())
    assert torch.equal(again.decode(), w)
    assert again.parts() == stored.parts()


@pytest.mark.parametrize("width", range(33))
def test_integers_of_any_width_are_packed_without_gaps(width):
    values = np.random.default_rng(width).integers(0, 1 << width, 1001)
    packed = pack_bits(values, width)
    assert packed.nbytes == math.ceil(1001 * width / 8)
    assert (unpack_bits(packed, 1001, width) == values).all()
    spelled = "".join(f"{v:0{width}b}" for v in values[:40]) if width else ""
    assert "".join(f"{b:08b}" for b in packed)[: len(spelled)] == spelled


def test_bits_for_is_the_logarithm_rounded_up():
    assert [bits_for(n) for n in (0, 1, 2, 3, 4, 5, 1024, 1025)] == [0, 0, 1, 2, 2, 3, 10, 11]


def test_smallest_goes_from_sparse_to_dense():
    forms = ("bitmask", "csr", "2:4")
    assert formats.smallest(sparse((256, 256), 0.005), forms) == "csr"
    assert formats.smallest(sparse((256, 256), 0.3), forms) == "bitmask"
    assert formats.smallest(torch.ones(256, 256), forms) == "dense"


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("3x5", "does not divide a matrix of 8x12"),
        ("2:4", "row 0 has more than 2 values in columns 0 to 3; prune it"),
        ("2:5", "does not divide 12 columns"),
        ("5:4", "0 < N <= M"),
        ("eie", "share weights first, at most 15"),
        ("zip", "unknown format 'zip'"),
    ],
)
def test_what_a_format_cannot_hold_is_one_clear_error(form, message):
    w = torch.arange(1.0, 97.0).reshape(8, 12)
    with pytest.raises(ValueError, match=message):
        formats.encode(w, form)
