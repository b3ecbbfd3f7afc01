"""The Fisher matrices that layers hold, beside dense ones made of loops."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.solvers.obs import greedy_losses, group_solve
from prunus.stats import block_fisher as stats
from prunus.stats.block_fisher import BlockFisher, Sampling
from prunus.stats.shared_fisher import SharedFisher

from tests.oracles.second_order import blocks_of_row, inverse, per_block
from tests.oracles.second_order import fisher as slow_fisher

FEW = settings(deadline=None, max_examples=25)
EXACT = torch.float64
SIZES = {
    "m": st.integers(1, 12),
    "rows": st.integers(1, 4),
    "cols": st.integers(1, 13),
    "block_size": st.integers(1, 15),
    "dual": st.booleans(),
    "seed": st.integers(0, 9),
}


def gradients(m, rows, cols, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, rows, cols, generator=generator, dtype=EXACT)


def filled(g, block_size, num_grads=None, damp=1e-2, at_once=1, dtype=EXACT, device=None):
    sampling = Sampling(len(g) if num_grads is None else num_grads)
    stat = BlockFisher(
        *g.shape[1:],
        sampling=sampling,
        block_size=block_size,
        damp=damp,
        dtype=dtype,
        device=device,
    )
    for part in g.split(at_once):
        stat.update(part)
    return stat


def primal_or_dual(g, block_size, dual, **more):
    """Whether gradients or sums are held depends on how many gradients are announced."""
    if dual:
        return filled(g, block_size, **more)
    return filled(g, block_size, num_grads=1024, **more)


def rank(f, w):
    return greedy_losses(f.inverse(), w.double())


@given(**SIZES)
@FEW
def test_products_diagonals_and_inverses_equal_the_dense_ones(
    m, rows, cols, block_size, dual, seed
):
    g = gradients(m, rows, cols, seed)
    stat, v = primal_or_dual(g, block_size, dual), gradients(1, rows, cols, 77)[0]
    expected = per_block(list(g), 1e-2, block_size, lambda f, v: f @ v, v)
    torch.testing.assert_close(stat.mul(v), expected)
    diag = per_block(list(g), 1e-2, block_size, lambda f, v: f.diagonal(), v)
    torch.testing.assert_close(stat.diag().double(), diag, rtol=1e-6, atol=1e-6)
    cuts = blocks_of_row(cols, block_size)
    for i in range(rows * len(cuts)):
        cut = cuts[i % len(cuts)]
        f = slow_fisher([sample[i // len(cuts), cut] for sample in g], 1e-2)
        torch.testing.assert_close(stat.inverse_block(i), inverse(f), rtol=1e-8, atol=1e-8)
    for i in (-1, rows * len(cuts)):
        with pytest.raises(IndexError, match=f"block {i} of {rows * len(cuts)}"):
            stat.inverse_block(i)


@given(**SIZES)
@FEW
def test_the_dual_form_is_held_when_fewer_and_gives_the_same(m, rows, cols, block_size, dual, seed):
    g, w = gradients(m, rows, cols, seed), gradients(1, rows, cols, 77)[0]
    few, many = filled(g, block_size), filled(g, block_size, num_grads=1024)
    assert few.dual == (m < min(block_size, cols))
    assert not many.dual
    torch.testing.assert_close(few.per_block(rank, w), many.per_block(rank, w))


def test_fewer_gradients_than_were_announced_give_their_own_mean():
    g = gradients(3, 2, 9)
    some, all_of_them = filled(g, 9, num_grads=7), filled(g, 9)
    assert some.dual
    v = gradients(1, 2, 9, 1)[0]
    torch.testing.assert_close(some.mul(v), all_of_them.mul(v))
    torch.testing.assert_close(some.inverse_block(1), all_of_them.inverse_block(1))


@given(**SIZES, limit=st.sampled_from([1, 500, 5000]), at_once=st.integers(1, 12))
@FEW
def test_chunks_and_portions_do_not_matter(m, rows, cols, block_size, dual, seed, limit, at_once):
    g, w = gradients(m, rows, cols, seed), gradients(1, rows, cols, 77)[0]
    expected = primal_or_dual(g, block_size, dual).per_block(rank, w)
    with mock.patch.dict(stats.CHUNK_BYTES, cpu=limit):
        stat = primal_or_dual(g, block_size, dual, at_once=at_once)
        torch.testing.assert_close(stat.per_block(rank, w), expected)


def test_several_hundred_gradients_are_flushed_as_they_come():
    g = gradients(300, 2, 10)
    v = gradients(1, 2, 10, 1)[0]
    expected = per_block(list(g), 1e-2, 8, lambda f, v: f @ v, v)
    for at_once in (1, 7, 300):
        torch.testing.assert_close(filled(g, 8, at_once=at_once).mul(v), expected)


@given(st.permutations(range(8)), st.booleans())
@FEW
def test_the_order_of_gradients_does_not_matter(order, dual):
    g, w = gradients(8, 3, 12), gradients(1, 3, 12, 1)[0]
    one, other = (primal_or_dual(x, 12, dual).per_block(rank, w) for x in (g, g[order]))
    torch.testing.assert_close(one, other)


def test_192_stays_192_and_the_last_block_of_a_row_is_what_is_left():
    def sizes(cols, block_size):
        stat = filled(gradients(1, 2, cols), block_size, num_grads=1024)
        return [len(stat.inverse_block(i)) for i in range(2 * -(-cols // block_size))]

    assert sizes(50, 16) == [16, 16, 16, 2] * 2
    assert sizes(576, 192) == [192] * 3 * 2
    assert sizes(1009, 192) == ([192] * 5 + [49]) * 2
    assert sizes(7, 192) == [7] * 2


def test_blocks_do_not_reach_into_the_next_row():
    g, v = gradients(5, 2, 6), torch.zeros(2, 6, dtype=EXACT)
    v[0] = 1
    product = filled(g, 4, num_grads=99).mul(v)
    assert bool((product[1] == 0).all())
    assert bool((product[0] != 0).all())


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5), (torch.bfloat16, 0.05)]
)
def test_other_storage_types_give_nearly_the_same(dtype, tolerance, dual):
    g, v = gradients(6, 3, 16), gradients(1, 3, 16, 1)[0]
    expected = per_block(list(g), 1e-2, 16, lambda f, v: f @ v, v)
    for device in (None, "cpu"):
        stat = primal_or_dual(g, 16, dual, dtype=dtype, device=device)
        error = stat.mul(v) - expected
        assert float(error.norm()) < tolerance * float(expected.norm())
        assert {t.dtype for t in stat.tensors()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("taken", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_of_any_type_are_taken(dtype, taken):
    g = gradients(4, 2, 10).to(taken)
    stat = filled(g, 4, num_grads=99, dtype=dtype)
    expected = per_block(list(g), 1e-2, 4, lambda f, _: f.diagonal(), g[0].double())
    torch.testing.assert_close(stat.diag().double(), expected, rtol=0.05, atol=0.05)


@given(**SIZES)
@FEW
def test_the_bytes_it_says_are_those_it_holds(m, rows, cols, block_size, dual, seed):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        stat = primal_or_dual(gradients(m, rows, cols, seed), block_size, dual, dtype=dtype)
        waiting = sum(g.nbytes for g in stat._waiting)
        stat.mul(torch.zeros(rows, cols))
        held = sum(t.nbytes for t in stat.tensors())
        assert held <= held + waiting <= stat.nbytes
        assert stat.with_rows(2 * rows).nbytes == 2 * stat.nbytes
        room = stat._chunk * cols * max(4, dtype.itemsize) * rows
        assert stat.nbytes == held + (0 if stat.dual else room)


def test_at_full_size_the_sums_are_all_but_a_small_part_of_the_bytes():
    stat = BlockFisher(10, 768, sampling=Sampling(1024), block_size=192, damp=1e-7)
    assert 4 * 10 * 768 * 192 < stat.nbytes < 4 * 10 * 768 * 192 * 1.3


def test_an_empty_copy_for_other_rows_has_the_same_settings():
    g = gradients(5, 4, 11)
    stat = filled(g, 4, num_grads=50, damp=0.3)
    part = stat.with_rows(2)
    part.update(g[:, 1:3])
    v = gradients(1, 4, 11, 1)[0]
    torch.testing.assert_close(part.mul(v[1:3]), stat.mul(v)[1:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_grads", [8, 64])
def test_gradients_of_scale_1_and_damp_1e_8_give_finite_numbers(dtype, num_grads):
    g, w = gradients(num_grads, 4, 32), gradients(1, 4, 32, 1)[0]
    stat = filled(g, 32, damp=1e-8, dtype=dtype)
    losses = stat.per_block(rank, w)
    assert bool(losses.isfinite().all())
    assert bool((losses > 0).all())
    new = stat.per_block(lambda f, x, k: group_solve(f.fisher(), x, k), w, losses > losses.median())
    assert bool(new.isfinite().all())


def test_repeated_gradients_in_single_precision_are_survived(caplog):
    g = gradients(3, 2, 24).repeat(30, 1, 1)  # of rank three, and rounded
    w = gradients(1, 2, 24, 1)[0]
    stat = filled(g, 24, num_grads=99, damp=1e-12, dtype=torch.float32)
    assert bool(stat.per_block(rank, w).isfinite().all())
    assert "not positive definite" in caplog.text


@given(**SIZES)
@FEW
def test_the_shared_matrix_sums_over_gradients_rows_and_blocks(
    m, rows, cols, block_size, dual, seed
):
    g = gradients(m, rows, cols, seed)
    stat = SharedFisher(cols, sampling=Sampling(m), block_size=block_size, dtype=EXACT)
    for part in g.split(2):
        stat.update(part)
    d = min(block_size, cols)
    expected = torch.zeros(d, d, dtype=EXACT)
    for k in range(m):
        for r in range(rows):
            for cut in blocks_of_row(cols, block_size):
                x = g[k, r, cut]
                expected[: len(x), : len(x)] += 2 / m * torch.outer(x, x)
    torch.testing.assert_close(stat.matrix(), expected)
    assert stat.count == m
    assert stat.nbytes == sum(t.nbytes for t in stat.tensors())


def test_the_shared_matrix_of_a_whole_row_has_all_columns():
    stat = SharedFisher(7, sampling=Sampling(4), block_size=None, device="cpu")
    stat.update(gradients(4, 3, 7).float())
    g = gradients(4, 3, 7).flatten(0, 1)
    torch.testing.assert_close(stat.matrix(), 2 / 4 * g.T @ g, rtol=1e-5, atol=1e-5)
