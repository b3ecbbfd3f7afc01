"""Sparse tensors hold what dense ones do, and refuse what is no set of sites."""

import pytest
import torch

from prunus import spatial

from tests.spatial.scenes import scene


def test_dense_and_back():
    x = scene()
    again = spatial.SparseTensor.from_dense(x.dense())
    torch.testing.assert_close(again.dense(), x.dense())
    assert len(again.features) == len(x.features)
    assert x.dense(channels_first=False).shape == (2, 7, 6, 8, 3)
    assert x.density == len(x.features) / (2 * 7 * 6 * 8)


def test_a_threshold_leaves_out_weak_sites():
    x = torch.tensor([[[[0.1, -2.0], [0.0, 0.5]]]])
    kept = spatial.SparseTensor.from_dense(x, threshold=0.3)
    assert kept.indices.tolist() == [[0, 0, 1], [0, 1, 1]]
    assert kept.features.tolist() == [[-2.0], [0.5]]


def test_gradients_go_through_dense_and_from_dense():
    x = torch.randn(1, 2, 3, 3, requires_grad=True)
    y = spatial.SparseTensor.from_dense(x)
    (y.dense() * 3).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 3.0))


def test_it_prints_what_it_holds():
    text = repr(scene((4, 4), batch=3, density=1.0))
    assert text == "SparseTensor(48 of 48 sites, 3 channels, shape (4, 4), batch of 3)"


@pytest.mark.parametrize(
    ("features", "indices", "message"),
    [
        (torch.ones(2, 1), torch.tensor([[0, 1, 1], [0, 1, 4]]), r"indices\[1\] = \[0, 1, 4\] is"),
        (torch.ones(2, 1), torch.tensor([[0, 1, 1], [2, 1, 1]]), r"outside 2 examples of \(4, 4\)"),
        (torch.ones(2, 1), torch.tensor([[0, 1, 1], [0, 1, 1]]), r"indices\[1\] .* is there twice"),
        (torch.ones(3, 1), torch.tensor([[0, 1, 1], [0, 1, 2]]), "do not fit a 2-D grid"),
    ],
)
def test_what_is_no_set_of_sites_is_refused(features, indices, message):
    with pytest.raises(ValueError, match=message):
        spatial.SparseTensor(features, indices, (4, 4), 2)


def test_features_of_another_length_are_refused():
    with pytest.raises(ValueError, match="1 features for"):
        scene().replace_feature(torch.ones(1, 1))


def test_grids_beyond_32_bits_have_64_bit_keys():
    shape = (5000, 5000, 5000)
    indices = torch.tensor([[0, 4999, 4999, 4998], [0, 4999, 4999, 4999], [0, 0, 0, 0]])
    x = spatial.SparseTensor(torch.eye(3), indices, shape, 1)
    kernel_map = x.sites.submanifold((3, 3, 3), (1, 1, 1))
    assert kernel_map.count == 3 + 2
    with pytest.raises(ValueError, match="more sites than 64-bit keys"):
        spatial.SparseTensor(torch.ones(1, 1), torch.tensor([[0, 0, 0, 0]]), (1 << 30,) * 3, 1)
