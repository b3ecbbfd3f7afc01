"""Masks that are 2:4 along rows and along columns at once, chosen tile by tile.

A tile is 4 x 4 and keeps two of each row and two of each column, so that a matrix and its transpose
are both 2:4. 90 of the 65,536 masks of a tile do so (Hubara et al., "Accelerated Sparse Neural
Training", 2021, https://arxiv.org/abs/2102.08124). Of Gaussian weights the two rules keep

- ``exact``, the best of the 90: half the weights and 82.2 % of their energy (sum of squares);
- ``greedy``, the largest magnitudes one by one: 49.0 % of the weights and 81.9 % of the energy.

Seven can hold more than eight: where the greedy rule leaves a slot empty, it sometimes beats the
best of the 90. The best of these masks, too, would keep 82.4 % of the energy.

The kernel's own default goes by signed values, which keeps 56.7 % of the energy; it is not used.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from prunus.core.names import did_you_mean

TILES = 1 << 12  # at once: 90 scores a tile are 1.5 MB, which stays in the cache of a CPU core
TILES_CUDA = 1 << 17  # 47 MB, for which a GPU has the room


@functools.cache
def legal_masks() -> Tensor:
    """(90, 16) all masks of a 4 x 4 tile, row by row, with two kept in each row and column."""
    pairs = [[i in pair for i in range(4)] for pair in itertools.combinations(range(4), 2)]
    with torch.inference_mode(False):
        tiles = torch.tensor(list(itertools.product(pairs, repeat=4)))
        return tiles[(tiles.sum(1) == 2).all(1)].flatten(1)


@functools.lru_cache(maxsize=16)
def _tables(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The masks as numbers and as booleans, and 90 to 1, (90, 1), to find the first of several."""
    with torch.inference_mode(False):
        masks = legal_masks().to(device)
        first = torch.arange(len(masks), 0, -1, dtype=torch.uint8, device=device)
        return masks.to(dtype), masks, first.unsqueeze(1)


def exact(tiles: Tensor) -> Tensor:
    """(tiles, 16) the mask of most energy; ``tiles`` is (16, tiles) of fp32 or fp64.

    Of equals the first in `legal_masks`. A tile with a NaN gets some legal mask.
    """
    table, masks, first = _tables(tiles.dtype, tiles.device)
    energy = table @ tiles.square()
    # argmax is not vectorized on CPUs; to look for the maximum takes half its time
    best: Tensor = (energy == energy.amax(0)).view(torch.uint8).mul_(first).amax(0)
    chosen: Tensor = masks[(len(masks) - best.long()).clamp_(max=len(masks) - 1)]
    return chosen


def greedy(tiles: Tensor) -> Tensor:
    """(tiles, 16) magnitudes in descending order, each taken if its row and column have room.

    ``tiles`` is (16, tiles). The rule of the kernel's ``largest_abs_values_greedy``. Equal
    magnitudes go in the order of the tile; the kernel's sorting network leaves their order open. A
    row that still has room may have it only in columns that are full: its slot then stays empty,
    in 16 % of Gaussian tiles.
    """
    magnitudes = tiles.abs().T.contiguous()  # sorting along strides takes 1.6 times as long
    order = magnitudes.argsort(dim=1, descending=True, stable=True).short().T.contiguous()
    down, right = order // 4 * 2, order % 4 * 2  # two bits for each row's and column's count
    rows, cols, kept = torch.zeros((3, *order.shape[1:]), dtype=torch.int16, device=tiles.device)
    for cell, row, col in zip(order, down, right, strict=True):
        free = ((((rows >> row) | (cols >> col)) & 2) == 0).short()
        rows += free << row
        cols += free << col
        kept |= free << cell
    cells = torch.arange(16, dtype=torch.int16, device=tiles.device)
    bits: Tensor = (kept.unsqueeze(1) >> cells) & 1
    return bits.bool()


RULES: dict[str, Callable[[Tensor], Tensor]] = {"exact": exact, "greedy": greedy}


@torch.no_grad()
def tile_mask(w: Tensor, rule: str = "exact") -> Tensor:
    """Boolean (rows, cols): at most two kept in each row and column of each 4 x 4 tile of ``w``.

    ``exact`` keeps exactly two. Scores are fp32, of fp64 weights fp64, whatever autocast says.
    Beyond the mask, memory stays below a few MB on a CPU, 100 MB on a GPU, for any size.

    Raises ValueError for an unknown rule and for sides that are not multiples of 4.
    """
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} is not known{did_you_mean(rule, RULES)}")
    rows, cols = w.shape
    if rows % 4 or cols % 4:
        raise ValueError(f"a matrix of {rows} x {cols} has no 4 x 4 tiles; pad both sides to 4s")
    mask = torch.empty(rows, cols, dtype=torch.bool, device=w.device)
    at_once = TILES_CUDA if w.is_cuda else TILES
    step = 4 * max(1, 4 * at_once // max(1, cols))
    with torch.autocast(w.device.type, enabled=False):
        for part, out in zip(torch.split(w, step), torch.split(mask, step), strict=True):
            wide = part if part.dtype == torch.float64 else part.float()
            tiles = wide.reshape(-1, 4, cols // 4, 4).permute(1, 3, 0, 2).reshape(16, -1)
            kept = RULES[rule](tiles).view(-1, cols // 4, 4, 4)
            out.view(-1, 4, cols // 4, 4).copy_(kept.transpose(1, 2))
    return mask


@torch.library.custom_op("prunus::tile_mask", mutates_args=())
def tile_mask_in_graph(w: Tensor, rule: str) -> Tensor:
    """`tile_mask` as one node of a compiled graph, its loop over parts not unrolled."""
    return tile_mask(w, rule)


@tile_mask_in_graph.register_fake
def _(w: Tensor, rule: str) -> Tensor:
    return torch.empty(w.shape, dtype=torch.bool, device=w.device)
