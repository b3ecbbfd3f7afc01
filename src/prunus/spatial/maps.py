"""Kernel maps: for each offset of a kernel, which input site meets which output site.

A submanifold map takes one sort and one binary search for each line of offsets on one side of the
centre, four for 3x3x3: along a line the next neighbour is the next key, and the other side is the
same pairs with input and output exchanged. See `keys`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prunus.spatial.keys import Grid, lower_bounds

Ints = tuple[int, ...]


@dataclass(eq=False)
class KernelMap:
    """Pairs (input, output) of all offsets, one offset after the other.

    `centre` is the offset at which every site meets itself, which has no pairs here; None if there
    is no such offset.
    """

    source: Tensor
    """(pairs,) rows of the input features"""
    target: Tensor
    """(pairs,) rows of the output features"""
    sizes: list[int]
    """pairs of each offset"""
    inputs: int
    outputs: int
    centre: int | None = None
    _transposed: KernelMap | None = field(default=None, repr=False)
    _table: Tensor | None = field(default=None, repr=False)

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """(source, target) of each offset."""
        sources = torch.split(self.source, self.sizes)
        return list(zip(sources, torch.split(self.target, self.sizes), strict=True))

    @property
    def count(self) -> int:
        """Pairs of all offsets, those of the centre among them: multiplications by Ci x Co."""
        return sum(self.sizes) + (self.inputs if self.centre is not None else 0)

    def transposed(self) -> KernelMap:
        """The map of the gradient, and of the inverse convolution: outputs become inputs."""
        if self._transposed is None:
            self._transposed = KernelMap(
                self.target, self.source, self.sizes, self.outputs, self.inputs, self.centre, self
            )
        return self._transposed

    def table(self) -> Tensor:
        """(outputs, offsets) the input of each output, `inputs` where there is none."""
        if self._table is None:
            offsets = len(self.sizes)
            table = self.source.new_full((self.outputs, offsets), self.inputs)
            if self.centre is not None:
                table[:, self.centre] = torch.arange(self.outputs, device=table.device)
            counts = torch.tensor(self.sizes, device=table.device)
            column = torch.repeat_interleave(
                torch.arange(offsets, device=table.device), counts, output_size=len(self.target)
            )
            table.view(-1).scatter_(0, self.target * offsets + column, self.source)
            self._table = table
        return self._table

    def without(self, dropped: Sequence[bool]) -> KernelMap:
        """The map with no pairs at the offsets where `dropped` is set."""
        keep = [not d or i == self.centre for i, d in enumerate(dropped)]
        pairs = [pair for pair, kept in zip(self.pairs, keep, strict=True) if kept]
        empty = self.source[:0]
        source, target = zip(*pairs, strict=True) if pairs else ((empty,), (empty,))
        sizes = [size if kept else 0 for size, kept in zip(self.sizes, keep, strict=True)]
        return KernelMap(
            torch.cat(source), torch.cat(target), sizes, self.inputs, self.outputs, self.centre
        )


def offsets_of(kernel: Ints) -> list[Ints]:
    """All places in a kernel, row-major, as in the weight of a convolution."""
    return list(itertools.product(*map(range, kernel)))


def submanifold_map(
    indices: Tensor, shape: Ints, batch_size: int, kernel: Ints, dilation: Ints
) -> KernelMap:
    """The map of a convolution whose output sites are its input sites.

    ``indices`` is (N, 1 + D), batch first, without repetitions. Raises ValueError for even kernels,
    which have no centre.
    """
    if any(k % 2 == 0 for k in kernel):
        raise ValueError(f"a submanifold kernel of {kernel} has no centre; use odd sizes")
    reach = tuple(k // 2 * d for k, d in zip(kernel, dilation, strict=True))
    grid = Grid(tuple(shape), reach)
    keys, order = torch.sort(grid.keys(indices, batch_size))
    offsets = [
        tuple(d * (o - k // 2) for o, k, d in zip(offset, kernel, dilation, strict=True))
        for offset in offsets_of(kernel)
    ]
    half = len(offsets) // 2
    before = _neighbours(keys, [grid.shift(offset) for offset in offsets[:half]])
    pairs = [(order.index_select(0, found), order.index_select(0, at)) for found, at in before]
    mirrored = [(target, source) for source, target in reversed(pairs)]
    empty = order[:0]
    together = [*pairs, (empty, empty), *mirrored]
    source, target = (torch.cat(side) for side in zip(*together, strict=True))
    sizes = [len(source) for source, _ in together]
    return KernelMap(source, target, sizes, len(indices), len(indices), half)


def _neighbours(keys: Tensor, shifts: list[int]) -> list[tuple[Tensor, Tensor]]:
    """For each shift the pairs (place of key + shift, place of key) in sorted keys."""
    result = []
    found = hit = None
    last = 0
    for shift in shifts:
        wanted = keys + shift
        if found is not None and hit is not None and shift == last + 1:
            # the lower bound moves on by one where the site before was there
            found = (found + hit).clamp_(max=max(0, len(keys) - 1))
        elif shift == -1:
            found = (torch.arange(len(keys), device=keys.device) - 1).clamp_(min=0)
        else:
            found = lower_bounds(keys, wanted)
        hit = keys.index_select(0, found) == wanted
        at = hit.nonzero().squeeze(1)
        result.append((found.index_select(0, at), at))
        last = shift
    return result


def strided_map(
    indices: Tensor, shape: Ints, batch_size: int, kernel: Ints, stride: Ints, padding: Ints,
    dilation: Ints,
) -> tuple[Tensor, Ints, KernelMap]:  # fmt: skip
    """Output places, output shape and map of a convolution.

    Every site whose window holds an input is an output, as in spconv, so that the output equals the
    dense convolution's everywhere. The outputs are in the order of their keys: one sort.
    """
    dims = range(len(shape))
    out_shape = tuple(
        (shape[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in dims
    )
    if min(out_shape) < 1:
        raise ValueError(
            f"a kernel of {kernel} does not fit sites of {tuple(shape)} with padding {padding}"
        )
    grid = Grid(out_shape, (0,) * len(shape))
    dtype = grid.dtype(batch_size)
    places = indices.to(dtype).T.contiguous()
    reached = [(torch.arange(len(indices), device=places.device), places[0] * grid.strides()[0])]
    for i in dims:
        axis = places[i + 1] + padding[i], stride[i], out_shape[i], grid.strides()[i + 1]
        reached = [
            part
            for source, key in reached
            for offset in range(kernel[i])
            for part in [_reach(source, key, offset * dilation[i], *axis)]
        ]
    sources, keys = zip(*reached, strict=True)
    unique, target = _unique(torch.cat(keys))
    sizes = [len(source) for source in sources]
    kernel_map = KernelMap(torch.cat(sources), target, sizes, len(indices), len(unique))
    return grid.places(unique), out_shape, kernel_map


def _reach(
    source: Tensor, key: Tensor, step: int, place: Tensor, stride: int, bound: int, weight: int
) -> tuple[Tensor, Tensor]:
    """Of some inputs those whose offset along an axis leads to an output, and its key so far."""
    moved = place.index_select(0, source) - step
    out = moved.div(stride, rounding_mode="floor")
    inside = ((moved >= 0) & (out * stride == moved) & (out < bound)).nonzero().squeeze(1)
    keys = key.index_select(0, inside) + out.index_select(0, inside) * weight
    return source.index_select(0, inside), keys


def _unique(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Keys in order, each once, and which of them each key is."""
    ordered, order = torch.sort(keys)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    inverse = torch.empty_like(order)
    inverse.scatter_(0, order, first.cumsum(0) - 1)
    return ordered[first], inverse
