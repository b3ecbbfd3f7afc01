"""Canonical Huffman codes, encoded and decoded without a loop over symbols.

The last stage of Han et al., "Deep Compression", ICLR 2016, https://arxiv.org/abs/1510.00149.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from prunus.formats.base import tensor
from prunus.formats.bits import Integers

LENGTH_BITS = 5
"""bits that store the length of one symbol's code"""
_LONGEST = 24
_CHUNK = 1 << 20


def code_lengths(counts: Integers) -> npt.NDArray[np.int64]:
    """(symbols,) bits of each symbol's code; 0 for symbols that never come, 1 for a lone one."""
    lengths = np.zeros(len(counts), np.int64)
    heap = [(int(count), [i]) for i, count in enumerate(counts) if count]
    if len(heap) == 1:
        lengths[heap[0][1]] = 1
    heapq.heapify(heap)
    while len(heap) > 1:
        rare, few = heapq.heappop(heap)
        next_rare, more = heapq.heappop(heap)
        lengths[few + more] += 1
        heapq.heappush(heap, (rare + next_rare, few + more))
    if lengths.max(initial=0) > _LONGEST:
        raise ValueError(f"codes of {lengths.max()} bits are too long; use fewer symbols")
    return lengths


def canonical_codes(lengths: Integers) -> npt.NDArray[np.int64]:
    """(symbols,) the code of each: shorter ones first, of equal length in order of symbols."""
    codes = np.zeros(len(lengths), np.int64)
    code = previous = 0
    for symbol in np.lexsort((np.arange(len(lengths)), lengths)):
        if lengths[symbol]:
            code <<= int(lengths[symbol]) - previous
            codes[symbol] = code
            code, previous = code + 1, int(lengths[symbol])
    return codes


@dataclass(frozen=True)
class Huffman:
    """A sequence of small integers as a stream of bits, and the lengths that the codes follow
    from."""

    count: int
    lengths: Tensor
    """(symbols,) uint8"""
    stream: Tensor
    """uint8, the first bit in the highest"""
    stream_bits: int

    @classmethod
    def encode(cls, symbols: Integers, alphabet: int) -> Huffman:
        """Integers from 0 to ``alphabet - 1``."""
        lengths = code_lengths(np.bincount(symbols, minlength=alphabet))
        codes = canonical_codes(lengths)
        chunks, total = [], 0
        for begin in range(0, len(symbols), _CHUNK):
            bits = _spell(symbols[begin : begin + _CHUNK], codes, lengths)
            chunks.append(bits)
            total += len(bits)
        stream = np.packbits(np.concatenate(chunks or [np.zeros(0, np.bool_)]))
        return cls(len(symbols), tensor(lengths.astype(np.uint8)), tensor(stream), total)

    def decode(self) -> npt.NDArray[np.int64]:
        """Each bit position is decoded as if a code began there; the chain from 0 is the text."""
        if not self.count:
            return np.zeros(0, np.int64)
        lengths = self.lengths.numpy().astype(np.int64)
        longest = int(lengths.max())
        table = _prefix_table(lengths, canonical_codes(lengths), longest)
        bits = np.unpackbits(self.stream.numpy(), count=self.stream_bits)
        bits = np.concatenate([bits, np.zeros(longest, np.uint8)])
        window = np.zeros(self.stream_bits, np.int64)
        for i in range(longest):
            window = window << 1 | bits[i : i + self.stream_bits]
        symbols = table[window]
        return symbols[_chain(np.arange(len(symbols)) + lengths[symbols], self.count)]

    @property
    def bits(self) -> int:
        """Bits of the stream and of the code lengths that decode it."""
        return self.stream_bits + LENGTH_BITS * self.lengths.numel()


def huffman_bits(counts: Integers) -> int:
    """Bits of a sequence in which the i-th symbol comes ``counts[i]`` times, table included."""
    return int((counts * code_lengths(counts)).sum()) + LENGTH_BITS * len(counts)


def _spell(symbols: Integers, codes: Integers, lengths: Integers) -> npt.NDArray[np.bool_]:
    each = lengths[symbols]
    ends = np.cumsum(each)
    distance = np.repeat(ends, each) - 1 - np.arange(ends[-1] if len(ends) else 0)
    bits: npt.NDArray[np.bool_] = np.repeat(codes[symbols], each) >> distance & 1 != 0
    return bits


def _prefix_table(lengths: Integers, codes: Integers, longest: int) -> npt.NDArray[np.int64]:
    """(2^longest,) the symbol whose code begins each word of `longest` bits."""
    table = np.zeros(1 << longest, np.int64)
    for symbol in np.flatnonzero(lengths):
        free = longest - int(lengths[symbol])
        begin = int(codes[symbol]) << free
        table[begin : begin + (1 << free)] = symbol
    return table


def _chain(after: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """0, after[0], after[after[0]], ...: the first `count` of them, by doubling."""
    jump = np.minimum(np.append(after, len(after)), len(after))
    found = np.zeros(1, np.int64)
    while len(found) < count:
        found = np.concatenate([found, jump[found]])
        jump = jump[jump]
    return found[:count]
