"""Factors and inverses of batches of matrices, beside numpy's."""

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.solvers import cholesky as linalg

from tests.oracles.second_order import fisher, inverse

SIZES = st.integers(1, 70)  # halves of halves, odd ones too
FEW = settings(deadline=None, max_examples=25)


def samples(n, m, d, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, m, d, generator=generator, dtype=torch.float64) * scale


def stacked(g, damp):
    return torch.stack([fisher(list(block), damp) for block in g])


def close(a, b, relative=1e-9):
    assert float((a - b).norm()) <= relative * float(b.norm())


@given(st.integers(1, 3), SIZES, st.integers(1, 80), st.integers(0, 9))
@FEW
def test_the_inverse_equals_numpys(n, d, m, seed):
    f = stacked(samples(n, m, d, seed), 0.1)
    before = f.clone()
    for mine, block in zip(linalg.inverse(f), f, strict=True):
        close(mine, inverse(block))
    assert torch.equal(f, before)


@given(st.integers(1, 3), SIZES, st.integers(1, 80), st.integers(0, 9))
@FEW
def test_the_factor_times_itself_is_the_matrix(n, d, m, seed):
    f = stacked(samples(n, m, d, seed), 0.1)
    factor = linalg.cholesky(f)
    assert torch.equal(factor, factor.tril())
    torch.testing.assert_close(factor @ factor.mT, f)


@given(st.integers(1, 3), SIZES, st.integers(1, 80), st.integers(0, 9), st.sampled_from([1e-3, 1]))
@FEW
def test_the_dual_form_equals_the_primal(n, d, m, seed, damp):
    g = samples(n, m, d, seed)
    expected = torch.stack([inverse(f) for f in stacked(g, damp)])
    close(linalg.dual_inverse(g, damp), expected)
    close(linalg.inverse(stacked(g, damp)), expected)


@pytest.mark.parametrize("m", [3, 200])
def test_damp_1e_8_beside_gradients_of_scale_1_gives_what_numpy_does(m):
    g = samples(2, m, 32, 0)
    expected = torch.stack([inverse(f) for f in stacked(g, 1e-8)])
    close(linalg.dual_inverse(g, 1e-8), expected, 1e-6)
    close(linalg.inverse(stacked(g, 1e-8)), expected, 1e-6)


def nearly_singular(d=20, m=5):
    """Its zero eigenvalues are off by what sums in single precision are off by."""
    g = samples(1, m, d, 3)[0].float()
    f = (g.T @ g / m).double()
    return f - 1e-9 * f.diagonal().mean() * torch.eye(d, dtype=torch.float64)


def test_a_matrix_that_is_not_quite_definite_is_shifted_and_the_log_says_so(caplog):
    good = stacked(samples(2, 40, 20, 1), 0.1)
    bad = nearly_singular()
    with caplog.at_level(logging.WARNING, logger="prunus"):
        factor = linalg.cholesky(torch.stack([good[0], bad, good[1]]))
    assert "1 of 3 blocks were not positive definite" in caplog.text
    assert "a larger 'damp'" in caplog.text
    assert torch.equal(factor[[0, 2]], torch.linalg.cholesky(good))
    added = (factor[1] @ factor[1].T - bad).diagonal() / bad.diagonal().mean()
    assert 1e-10 < float(added.mean()) < 1e-5
    assert f"up to {float(added.mean()):.0e} of" in caplog.text


def test_a_shift_goes_no_further_than_it_must(caplog):
    shift, eye = 3e-5, torch.eye(4, dtype=torch.float64)
    f = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)) - shift * eye
    factor = linalg.cholesky(f.unsqueeze(0))[0]
    added = (factor @ factor.T - f).diagonal()
    torch.testing.assert_close(added, torch.full_like(added, 1e-4 * float(f.diagonal().mean())))
    assert "up to 1e-04" in caplog.text


def test_good_matrices_are_not_spoken_of(caplog):
    linalg.inverse(stacked(samples(3, 40, 20, 1), 0.1))
    assert not caplog.records


def test_the_inverse_of_a_shifted_matrix_is_positive_definite(caplog):
    inv = linalg.inverse(nearly_singular().unsqueeze(0))[0]
    assert bool(inv.isfinite().all())
    assert np.linalg.eigvalsh(inv.numpy()).min() > 0
    assert caplog.records


@pytest.mark.parametrize(
    "f",
    [
        -torch.eye(3),
        torch.zeros(3, 3),
        torch.eye(3) * float("nan"),
        torch.eye(3) - torch.ones(3, 3),
    ],
    ids=["negative", "zero", "nan", "indefinite"],
)
def test_a_hopeless_matrix_is_refused_with_the_remedy(f):
    batch = torch.stack([torch.eye(3), f]).double()
    with pytest.raises(ValueError, match=r"1 of 2 matrices .* not positive definite; raise 'damp'"):
        linalg.inverse(batch)


def test_the_dual_form_of_nothing_is_the_inverse_damp():
    expected = torch.eye(4, dtype=torch.float64) / 1e-7
    torch.testing.assert_close(linalg.dual_inverse(samples(1, 2, 4, 0) * 0, 1e-7)[0], expected)


def test_the_dual_form_shifts_too_where_gradients_repeat(caplog):
    g = samples(1, 1, 8, 0).expand(1, 4, 8).contiguous()  # one sample four times: rank one
    c = linalg.dual_inverse(g, 1e-18)
    assert bool(c.isfinite().all())
    assert "not positive definite" in caplog.text


@pytest.mark.parametrize("damp", [1e-12, 1e-8, 1e-4])
@pytest.mark.parametrize("exponent", [-20, -10, 10, 20])  # of 2: twelve orders of magnitude
def test_the_dual_form_scales_with_gradients_and_damp_together(damp, exponent):
    g, s = samples(2, 4, 12, 0), 2.0**exponent
    plain = linalg.dual_inverse(g, damp)
    assert torch.equal(linalg.dual_inverse(g * s, damp * s * s), plain / (s * s))


@pytest.mark.parametrize("size", [1e3, 1e6, 1e9])
def test_a_damp_that_is_not_resolved_beside_gradients_is_raised_and_told(size, caplog):
    g = samples(2, 4, 12, 0) * size
    mean = g.square().sum((1, 2)) / (4 * 12)
    expected = torch.stack([inverse(f) for f in (stacked(g, 0) + torch.diag_embed(
        (1e-10 * mean).unsqueeze(1).expand(2, 12)))])  # fmt: skip
    close(linalg.dual_inverse(g, 1e-8), expected, 1e-4)
    assert "2 of 2 blocks were not positive definite to working precision" in caplog.text
    assert "damp=1e-08 is too small" in caplog.text
