"""Second-order scores do not depend on the size of the loss, whatever gradients are summed in."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import prunus
from prunus import CAP, OBS, Calibration, FastCAP, Ranks, Sampling
from prunus.core.patterns import parse_pattern
from prunus.stats import BlockFisher, SharedFisher
from prunus.stats.fisher_blocks import unit_for

ROWS, COLS = 3, 12
FEW = settings(deadline=None, max_examples=30)
SCALES = st.floats(-14, 14)  # of the gradients, so 28 orders of magnitude of the Fisher matrix
FORMS = st.sampled_from([(6, 12), (40, 12), (40, 8), (6, 4)])  # gradients, block size


def gradients(count, seed=0):
    """Of very different sizes in different rows."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(count, ROWS, COLS, generator=generator, dtype=torch.float64)
    return g * torch.tensor([1.0, 0.03, 5.0]).view(1, ROWS, 1)


def weights(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, COLS, generator=generator, dtype=torch.float64)


def filled(g, block, damp, dtype):
    sampling = Sampling(len(g))
    stat = BlockFisher(ROWS, COLS, sampling=sampling, block_size=block, damp=damp, dtype=dtype)
    for part in torch.split(g, 5):
        stat.update(part.to(torch.promote_types(dtype, torch.float32)))
    return stat


@given(
    kind=st.sampled_from([OBS, CAP]),
    pattern=st.sampled_from(["unstructured", "2:4"]),
    form=FORMS,
    scale=SCALES,
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@FEW
def test_scores_and_weights_follow_a_loss_and_a_damp_that_are_scaled_together(
    kind, pattern, form, scale, dtype
):
    (count, block), s = form, 10.0**scale
    pruner, shape, w = kind(), parse_pattern(pattern), weights().float()
    g = gradients(count)
    plain, scaled = filled(g, block, 1e-3, dtype), filled(g * s, block, 1e-3 * s * s, dtype)
    expected = pruner.scores(w, plain, shape, Ranks()).double()
    scores = pruner.scores(w, scaled, shape, Ranks()).double() / (s * s)
    torch.testing.assert_close(scores, expected, rtol=2e-3, atol=1e-30)
    mask = shape.mask(expected, w.numel() // 2)
    new, again = (pruner.rebuild(w, stat, mask) for stat in (plain, scaled))
    torch.testing.assert_close(again, new, rtol=1e-2, atol=1e-4)


@given(form=FORMS, scale=SCALES, dtype=st.sampled_from([torch.float32, torch.float64]))
@FEW
def test_fastcap_does_not_know_the_size_of_the_loss(form, scale, dtype):
    (count, block), w = form, weights().float()

    def solved(g):
        sampling = Sampling(count)
        stat = SharedFisher(COLS, sampling=sampling, block_size=block, dtype=dtype)
        for part in torch.split(g, 5):
            stat.update(part.to(dtype))
        return FastCAP().solve(w, stat, parse_pattern("unstructured"), w.numel() // 2, Ranks())

    (new, mask), (scaled, same) = solved(gradients(count)), solved(gradients(count) * 10.0**scale)
    assert torch.equal(mask, same)
    torch.testing.assert_close(scaled, new, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1.0, 1e12, 1e18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [(6, 12), (40, 12)])
def test_squares_neither_vanish_nor_burst_in_what_they_are_summed_in(scale, dtype, form):
    g = gradients(form[0]) * scale
    stat = filled(g, form[1], 1e-2 * scale * scale, dtype)
    exact = filled(gradients(form[0]), form[1], 1e-2, torch.float64)
    loose = 3e-2 if dtype == torch.bfloat16 else 1e-5
    v = weights()
    got, expected = stat.mul(v).double() / (scale * scale), exact.mul(v)
    assert float((got - expected).norm()) < loose * float(expected.norm())


def test_rows_of_any_size_beside_each_other_keep_their_digits():
    g = gradients(40)
    g[:, 0] *= 1e-22
    g[:20, 1] *= 1e-24  # it grows while it is summed
    stat, exact = (filled(g, 12, 1e-60, t) for t in (torch.float32, torch.float64))
    products = stat.mul(weights()), exact.mul(weights())
    torch.testing.assert_close(*products, rtol=1e-4, atol=0)


def test_ranks_agree_on_the_unit_before_they_add_up():
    class Two(Ranks):
        def all_reduce(self, t):
            return t + torch.tensor([0.0, 3e-5], dtype=t.dtype)

    small = SharedFisher(COLS, sampling=Sampling(4), block_size=None)
    small.update((gradients(4) * 1e-16).float())
    before = small.matrix()
    small.align(Two(None, 0, 2))
    assert small._unit == 1  # of the larger gradients on the other rank
    torch.testing.assert_close(small.matrix(), before, rtol=1e-3, atol=1e-38)


def test_units_are_powers_of_two_and_ordinary_gradients_have_none():
    peaks = torch.tensor([0.0, 1e-9, 3.0, 1e9, 3e-25, 7e20], dtype=torch.float64)
    unit = unit_for(peaks)
    assert unit[:4].tolist() == [1.0] * 4
    assert torch.equal(torch.frexp(unit)[0], torch.full((6,), 0.5, dtype=torch.float64))
    assert ((peaks / unit)[4:] >= 1).all()
    assert ((peaks / unit)[4:] < 2).all()


@pytest.mark.parametrize("count", [12, 16, 40])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_a_matrix_in_bfloat16_serves_cap_with_few_gradients(count, pattern):
    """As many as a block is long: a rounded sum of them would have negative eigenvalues."""
    g, w, shape = gradients(count), weights(), parse_pattern(pattern)
    stat, exact = (filled(g, 12, 1e-8, t) for t in (torch.bfloat16, torch.float64))
    assert not stat.dual
    for i in range(ROWS):
        assert float(torch.linalg.eigvalsh(stat.inverse_block(i)).min()) > 0
    scores, wanted = (CAP().scores(w, s, shape, Ranks()) for s in (stat, exact))
    masks = [shape.mask(s, w.numel() // 2) for s in (scores, wanted)]
    assert (masks[0] == masks[1]).float().mean() > 0.8
    kept = exact_loss(g, w, CAP().rebuild(w, stat, masks[0]))
    magnitude = shape.mask(w.abs(), w.numel() // 2)
    assert kept < exact_loss(g, w, torch.where(magnitude, w, 0))


def exact_loss(g, w, new):
    return float(((g * (new - w)).sum(2) ** 2).sum())


@pytest.mark.parametrize("pruner", [OBS, CAP, FastCAP])
@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6])
def test_a_model_is_pruned_alike_whatever_its_loss_is_multiplied_by(pruner, scale):
    def masks(scale):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
        data = [(torch.randn(4, 8), torch.randn(4, 2)) for _ in range(16)]
        settings = {"num_grads": 16, "damp": 1e-2 if pruner is FastCAP else 1e-4 * scale**2}
        method = pruner(block_size=8, **settings)

        def loss(output, target):
            return scale * nn.functional.mse_loss(output, target)

        calibration = Calibration(data, loss)
        prunus.prune(model, method, sparsity=0.5, layers="*", calibration=calibration)
        return [p != 0 for p in model.parameters() if p.dim() > 1]

    assert all(map(torch.equal, masks(scale), masks(1.0)))
