"""Pooling equals dense pooling where it is defined; tuning chooses and is remembered."""

import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prunus import spatial

from tests.spatial.scenes import scene


def test_max_pooling_takes_the_largest_of_the_sites():
    x = scene((8, 6, 7), density=0.3)
    pooled = spatial.SparseMaxPool3d(3, 2, 1)(x)
    lowest = torch.finfo(torch.float64).min
    there = x.replace_feature(torch.ones_like(x.features)).dense() > 0
    dense = F.max_pool3d(x.dense().masked_fill(~there, lowest), 3, 2, 1)
    expected = dense.masked_fill(dense == lowest, 0)
    torch.testing.assert_close(pooled.dense(), expected)


def test_average_pooling_leaves_out_empty_sites():
    x = scene((8, 6), density=0.4)
    pooled = spatial.SparseAvgPool2d(2)(x)
    there = x.replace_feature(torch.ones_like(x.features)).dense()
    sums, counts = (F.avg_pool2d(t, 2) * 4 for t in (x.dense(), there))
    torch.testing.assert_close(pooled.dense(), sums / counts.clamp(min=1))


def test_pooling_can_be_undone_by_its_key():
    x = scene((8, 6))
    down = spatial.SparseMaxPool2d(2, indice_key="pool")
    up = spatial.SparseInverseConv2d(3, 3, 2, "pool").double()
    assert up(down(x)).sites is x.sites


def test_global_pooling_is_a_mean_for_each_example():
    indices = torch.tensor([[0, 1, 1], [0, 2, 0], [2, 0, 1]])
    x = spatial.SparseTensor(torch.tensor([[1.0], [3.0], [7.0]]), indices, (3, 3), 3)
    assert spatial.SparseGlobalAvgPool()(x).tolist() == [[2.0], [0.0], [7.0]]


def test_plain_modules_act_on_features():
    x = scene((6, 6), channels=4)
    net = spatial.SparseSequential(
        spatial.SubMConv2d(4, 8, 3), nn.BatchNorm1d(8), nn.ReLU(),
        spatial.SparseSequential(spatial.SparseMaxPool2d(2)), spatial.ToDense(),
    ).double()  # fmt: skip
    y = net(x)
    assert y.shape == (2, 8, 3, 3)
    assert bool((y >= 0).all())


def net():
    torch.manual_seed(0)
    return spatial.SparseSequential(
        spatial.SubMConv2d(3, 8, 3), nn.ReLU(), spatial.SparseConv2d(8, 8, 3, 2, 1)
    ).double()


def test_tuning_sets_the_fastest_and_its_file_sets_it_again(tmp_path):
    model, x = net(), scene((20, 20))
    expected = model(x).dense()
    times = spatial.tune(model, [x, x], tmp_path / "tuned.json")
    assert set(times) == {"0", "2"}
    assert json.loads((tmp_path / "tuned.json").read_text()) == times
    for name, layer in times.items():
        assert set(layer) == set(spatial.DATAFLOWS)
        assert all(math.isfinite(t) and t > 0 for t in layer.values())
        assert model[int(name)].dataflow == min(layer, key=layer.get)
    torch.testing.assert_close(model(x).dense(), expected)
    again = net()
    spatial.apply_tuning(again, tmp_path / "tuned.json")
    assert [again[i].dataflow for i in (0, 2)] == [model[i].dataflow for i in (0, 2)]
    assert not model[0]._forward_pre_hooks


def test_a_file_of_another_model_is_refused(tmp_path):
    (tmp_path / "tuned.json").write_text('{"9": {"fused": 1.0}}')
    with pytest.raises(ValueError, match="has '9', the model has no such sparse convolution"):
        spatial.apply_tuning(net(), tmp_path / "tuned.json")


def test_auto_measures_each_size_once():
    x, module = scene((20, 20)), spatial.SubMConv2d(3, 8, 3, dataflow="auto").double()
    expected = spatial.SubMConv2d(3, 8, 3).double()
    expected.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(x).features, expected(x).features)
    module(x)
    assert len(module._measured) == 1
