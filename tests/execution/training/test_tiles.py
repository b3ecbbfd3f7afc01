"""Masks of 4 x 4 tiles: legal both ways, the best of all, and what the rules keep."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.execution.training import legal_masks, tile_mask
from prunus.execution.training.tiles import tile_mask_in_graph

RULES = ("exact", "greedy")
sides = st.integers(1, 9).map(lambda n: 4 * n)
seeds = st.integers(0, 2**31)


def random(rows, cols, seed, dtype=torch.float64):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tiles_of(t):
    """(tiles, 4, 4), one after the other."""
    rows, cols = t.shape
    cut = itertools.product(range(0, rows, 4), range(0, cols, 4))
    return torch.stack([t[i : i + 4, j : j + 4] for i, j in cut])


def best_energy(tile):
    return max((tile * mask.view(4, 4)).square().sum().item() for mask in legal_masks())


def greedy_by_hand(tile):
    """One value after the other, largest first, equals in the order of the tile."""
    mask = torch.zeros(4, 4, dtype=torch.bool)
    flat = tile.abs().flatten().tolist()
    for cell in sorted(range(16), key=lambda i: (-flat[i], i)):
        row, col = divmod(cell, 4)
        mask[row, col] = mask[row].sum() < 2 and mask[:, col].sum() < 2
    return mask


def test_there_are_90_masks_and_they_are_all_that_keep_two_of_each_row_and_column():
    every = torch.tensor(list(itertools.product([False, True], repeat=16))).view(-1, 4, 4)
    legal = every[(every.sum(1) == 2).all(1) & (every.sum(2) == 2).all(1)]
    ours = {tuple(mask.tolist()) for mask in legal_masks()}
    assert len(legal_masks()) == 90
    assert ours == {tuple(mask.flatten().tolist()) for mask in legal}


@settings(max_examples=20, deadline=None)
@given(sides, sides, seeds)
def test_exact_is_the_best_of_all_masks_on_every_tile(rows, cols, seed):
    w = random(rows, cols, seed)
    kept = tiles_of(torch.where(tile_mask(w), w, 0))
    energy = kept.square().sum((1, 2))
    best = torch.tensor([best_energy(tile) for tile in tiles_of(w)], dtype=w.dtype)
    torch.testing.assert_close(energy, best)
    # an unfilled tile is none of the 90, and may hold more
    greedy = tiles_of(tile_mask(w, "greedy"))
    less = (tiles_of(w) * greedy).square().sum((1, 2)) <= energy + 1e-12
    assert (less | (greedy.sum((1, 2)) < 8)).all()


@settings(max_examples=20, deadline=None)
@given(sides, sides, seeds, st.sampled_from([2.0, 0.5]))
def test_greedy_is_the_rule_by_hand_also_where_magnitudes_are_equal(rows, cols, seed, scale):
    w = (random(rows, cols, seed) * scale).round()
    by_hand = torch.stack([greedy_by_hand(tile) for tile in tiles_of(w)])
    assert torch.equal(tiles_of(tile_mask(w, "greedy")), by_hand)


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=20, deadline=None)
@given(sides, sides, seeds, st.booleans())
def test_the_matrix_and_its_transpose_are_both_2_of_4(rule, rows, cols, seed, coarse):
    w = random(rows, cols, seed)
    mask = tile_mask(w.round() if coarse else w, rule)
    for m in (mask, mask.T):
        counts = m.reshape(-1, 4).sum(1)
        assert (counts == 2).all() if rule == "exact" else (counts <= 2).all()


@pytest.mark.parametrize("rule", RULES)
def test_the_mask_of_the_transpose_is_the_transposed_mask(rule):
    w = random(64, 32, 3)
    assert torch.equal(tile_mask(w.T, rule), tile_mask(w, rule).T)
    assert torch.equal(tile_mask(w.T.contiguous(), rule), tile_mask(w, rule).T)


def test_the_rules_keep_what_the_text_says_of_gaussian_weights():
    w = random(2048, 1024, 1, torch.float32)
    shares = {}
    for rule in RULES:
        mask = tile_mask(w, rule)
        energy = torch.where(mask, w, 0).square().sum() / w.square().sum()
        shares[rule] = (mask.float().mean().item(), energy.item())
    # what the kernel does by default: signed values in descending order
    signed = tile_mask(w - w.min(), "greedy")
    signed_energy = torch.where(signed, w, 0).square().sum() / w.square().sum()
    assert shares["exact"] == (0.5, pytest.approx(0.822, abs=1e-3))
    assert shares["greedy"] == (pytest.approx(0.490, abs=1e-3), pytest.approx(0.819, abs=1e-3))
    assert signed_energy.item() == pytest.approx(0.566, abs=2e-3)
    holes = (tiles_of(tile_mask(w, "greedy")).sum((1, 2)) < 8).float().mean()
    assert holes.item() == pytest.approx(0.16, abs=5e-3)


@settings(max_examples=30, deadline=None)
@given(sides, sides, seeds, st.floats(0, 0.9))
def test_the_kernels_rule_finds_the_exact_mask_again_in_the_masked_weight(rows, cols, seed, zeros):
    w = random(rows, cols, seed)
    mask = tile_mask(w)
    assert torch.equal(tile_mask(torch.where(mask, w, 0), "greedy"), mask)
    # kept zeros may lose their slot, and nothing with it
    w[random(rows, cols, seed + 1).abs() < zeros] = 0
    masked = torch.where(tile_mask(w), w, 0)
    assert torch.equal(torch.where(tile_mask(masked, "greedy"), masked, 0), masked)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_and_autocast_do_not_blur_the_choice(dtype):
    w = random(64, 64, 5, dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        blurred = tile_mask(w)
    assert torch.equal(blurred, tile_mask(w))
    energy = tiles_of(torch.where(blurred, w, 0).double()).square().sum((1, 2))
    best = torch.tensor([best_energy(tile) for tile in tiles_of(w.double())], dtype=torch.double)
    torch.testing.assert_close(energy, best, rtol=1e-6, atol=0)


def test_parts_are_chosen_as_the_whole_would_be():
    w = random(4096, 64, 7, torch.float32)  # 16,384 tiles: more than at once
    parts = torch.cat([tile_mask(part) for part in w.split(512)])
    assert torch.equal(tile_mask(w), parts)


@pytest.mark.parametrize("rule", RULES)
def test_degenerate_weights_get_legal_masks(rule):
    for w in (torch.zeros(8, 8), torch.full((8, 8), torch.nan), torch.full((8, 8), -torch.inf)):
        assert (tile_mask(w, rule).view(-1, 4).sum(1) <= 2).all()
    assert tile_mask(torch.empty(0, 8), rule).shape == (0, 8)


def test_the_node_of_a_graph_is_the_function():
    w = random(16, 32, 9)
    for rule in RULES:
        assert torch.equal(tile_mask_in_graph(w, rule), tile_mask(w, rule))
    torch.library.opcheck(tile_mask_in_graph, (w, "exact"))


def test_what_has_no_tiles_is_refused():
    with pytest.raises(ValueError, match="6 x 8 has no 4 x 4 tiles"):
        tile_mask(torch.ones(6, 8))
    with pytest.raises(ValueError, match="rule='exakt' is not known; did you mean 'exact'"):
        tile_mask(torch.ones(8, 8), "exakt")
