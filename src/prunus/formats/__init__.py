"""Storage formats of sparse matrices: what zeros are worth in memory, exact to the bit.

Every format encodes a tensor, decodes it to the same values, and counts its bits. None of them
makes a CPU faster; see `prunus.accelerate` for what does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from prunus.formats.base import Encoded, Mask, as_matrix, value_bits
from prunus.formats.bitmask import Bitmask
from prunus.formats.bits import nonzero
from prunus.formats.block import Block
from prunus.formats.compressed import CSC, CSR
from prunus.formats.cutlass import pack_cutlass, show_tile
from prunus.formats.dense import Dense
from prunus.formats.eie import EIE
from prunus.formats.huffman import Huffman, huffman_bits
from prunus.formats.lanes import Reset, entry_counts, expected_entries
from prunus.formats.nm import NM

__all__ = [
    "CSC",
    "CSR",
    "EIE",
    "FORMATS",
    "NM",
    "Bitmask",
    "Block",
    "Dense",
    "Encoded",
    "Huffman",
    "Mask",
    "Reset",
    "compress",
    "encode",
    "entry_counts",
    "expected_entries",
    "huffman_bits",
    "matrix_mask",
    "pack_cutlass",
    "restore",
    "show_tile",
    "size",
    "sizes",
    "smallest",
]

FORMATS: dict[str, type[Encoded]] = {
    form.name: form for form in (Dense, Bitmask, CSR, CSC, Block, NM, EIE)
}


class _Sized(Protocol):
    def size(self, mask: Mask, value_bits: int, **options: Any) -> int: ...


def _parse(form: str) -> tuple[str, dict[str, Any]]:
    """``"2:4"`` -> nm with N and M, ``"8x8"`` -> block; names stand for themselves."""
    if match := re.fullmatch(r"(\d+):(\d+)", form):
        return "nm", {"n": int(match[1]), "m": int(match[2])}
    if match := re.fullmatch(r"(\d+)x(\d+)", form):
        return "block", {"block": (int(match[1]), int(match[2]))}
    if form not in FORMATS:
        raise ValueError(f"unknown format {form!r}; use {', '.join(FORMATS)}, '2:4' or '8x8'")
    return form, {}


def encode(t: Tensor, form: str, **options: Any) -> Encoded:
    """Store a tensor in a format: ``bitmask``, ``csr``, ``csc``, ``2:4``, ``8x8``, ``eie``, ...

    >>> import torch
    >>> from prunus import formats
    >>> w = torch.tensor([[0.0, 3.0, 0.0, 0.0], [1.0, 0.0, 0.0, 2.0]])
    >>> stored = formats.encode(w, "csr")
    >>> stored.parts()
    {'pointers': 96, 'indices': 6, 'values': 96}
    >>> torch.equal(stored.decode(), w)
    True

    Raises ValueError where the format cannot hold the tensor.
    """
    name, parsed = _parse(form)
    return FORMATS[name].encode(t, **parsed, **options)


def restore(name: str, tensors: Mapping[str, Tensor], options: Mapping[str, Any]) -> Encoded:
    """What `Encoded.tensors` and `Encoded.options` of a format came from."""
    return FORMATS[name].restore(tensors, options)


def matrix_mask(t: Tensor) -> Mask:
    """(rows, columns) where a tensor is not zero, its first dimension as rows."""
    return nonzero(as_matrix(t))


def sizes(t: Tensor, forms: tuple[str, ...] = ("dense", "bitmask", "csr", "csc")) -> dict[str, int]:
    """Bits that each format takes for a tensor, counted without encoding it."""
    return {form: size(t, form) for form in forms}


def size(t: Tensor, form: str, **options: Any) -> int:
    """Bits that `encode` would take, by the same options.

    Raises ValueError where the format cannot hold the tensor.
    """
    name, parsed = _parse(form)
    sized: _Sized = FORMATS[name]  # type: ignore[assignment]
    return sized.size(matrix_mask(t), value_bits(t), **parsed, **options)


_COMPACT = ("bitmask", "csr", "csc", "1:4", "2:8")
_SAMPLE = 4096


def compress(t: Tensor) -> Encoded:
    """The tensor in whichever lossless format takes least.

    Among them is EIE's with one element, where the tensor has at most 15 values beside zero.
    """
    form, options = smallest(t, _COMPACT), {}
    if _has_few_values(t):
        shared = {"elements": 1, "reset": "stream"}
        if size(t, "eie", **shared) < size(t, form):
            form, options = "eie", shared
    return encode(t, form, **options)


def _has_few_values(t: Tensor) -> bool:
    if t.dtype.itemsize == 1:  # a codebook saves nothing, nor can float8 be sorted
        return False
    flat = t.detach().reshape(-1)
    if len(torch.unique(flat[:_SAMPLE])) > 16:  # most tensors are found out here
        return False
    return len(torch.unique(flat)) <= 15 + int(bool((flat == 0).any()))


def smallest(t: Tensor, forms: tuple[str, ...] = ("bitmask", "csr", "csc")) -> str:
    """The format that takes least of ``dense`` and these; formats that do not fit are passed."""
    best, least = "dense", sizes(t, ("dense",))["dense"]
    for form in forms:
        try:
            bits = sizes(t, (form,))[form]
        except ValueError:
            continue
        if bits < least:
            best, least = form, bits
    return best
