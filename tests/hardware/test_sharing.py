"""Shared weights come from k-means, and training moves the shared values alone."""

import copy

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from prunus import formats, hardware
from prunus.hardware.kmeans import kmeans, nearest


def plain_kmeans(values, clusters, rounds=300):
    """Lloyd's algorithm as the textbook has it: every value against every centroid."""
    centroids = np.linspace(values.min(), values.max(), clusters)
    for _ in range(rounds):
        distances = np.abs(values[:, None] - centroids)
        # of two that are equally near the upper one
        owner = clusters - 1 - distances[:, ::-1].argmin(1)
        new = np.array(
            [
                values[owner == i].mean() if (owner == i).any() else centroids[i]
                for i in range(clusters)
            ]
        )
        if np.allclose(new, centroids, rtol=0, atol=0):
            break
        centroids = new
    return np.unique(centroids[np.unique(owner)])


@settings(max_examples=60, deadline=None)
@given(clusters=st.integers(1, 20), count=st.integers(1, 300), seed=st.integers(0, 999))
def test_sorted_kmeans_equals_the_textbook(clusters, count, seed):
    values = np.random.default_rng(seed).standard_normal(count)
    centroids = kmeans(values, clusters)
    np.testing.assert_allclose(centroids, plain_kmeans(values, clusters), atol=1e-12)
    owner = np.abs(values[:, None] - centroids).argmin(1)
    assert (nearest(values, centroids) == owner).all()


def test_few_values_are_their_own_centroids():
    assert kmeans(np.array([3.0, 3.0, 5.0]), 15).tolist() == [3, 5]
    assert kmeans(np.zeros(0), 15).tolist() == []
    with pytest.raises(ValueError, match="clusters=0; use at least 1"):
        kmeans(np.ones(3), 0)


def pruned_net():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 5)
    )
    for layer in net[::2]:
        layer.weight.data *= torch.rand_like(layer.weight) < 0.4
    return net


ALL = ["0", "2", "4"]


def test_sharing_keeps_zeros_and_leaves_few_values():
    net = pruned_net()
    before = [layer.weight != 0 for layer in net[::2]]
    sharing = hardware.share_weights(net, 3, layers=ALL)
    assert set(sharing) == set(ALL)
    for layer, kept in zip(net[::2], before, strict=True):
        assert torch.equal(layer.weight != 0, kept)
        assert len(layer.weight.unique()) <= 8
        assert formats.encode(layer.weight, "eie", code_bits=3).code_bits == 3


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, weight_decay=0.01),
        lambda p: torch.optim.AdamW(p, 0.01),
    ],
    ids=["SGD", "AdamW"],
)
def test_training_moves_the_shared_values_and_lowers_the_loss(optimizer):
    net = pruned_net()
    x, y = torch.randn(64, 20), torch.randint(0, 5, (64,))
    codes, losses = {}, []
    optimizer = optimizer(net.parameters())
    with hardware.share_weights(net, 4, layers=ALL, optimizer=optimizer) as sharing:
        codes = {name: weight.codes.clone() for name, weight in sharing.items()}
        for _ in range(20):
            loss = nn.functional.cross_entropy(net(x), y)
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            for name, code in codes.items():
                weight = net[int(name)].weight
                assert len(weight.unique()) <= 16
                assert not weight[code == 0].any()
                for c in range(1, int(code.max()) + 1):
                    assert len(weight[code == c].unique()) == 1
    assert losses[-1] < losses[0]
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_step_is_the_step_of_a_codebook_parameter():
    """Gradient descent on the codebook itself, through w = codebook[codes], in float64."""
    net = pruned_net().double()
    optimizer = torch.optim.SGD([net[0].weight], 0.1)
    with hardware.share_weights(net, 3, layers=["0"], optimizer=optimizer) as sharing:
        weight = sharing["0"]
        codebook = weight.codebook().requires_grad_()
        x = torch.randn(9, 20, dtype=torch.float64)
        twin = copy.deepcopy(net)

        def loss(w):
            return (torch.nn.functional.linear(x, w, twin[0].bias) ** 2).sum()

        (gradient,) = torch.autograd.grad(loss(codebook[weight.codes]), codebook)
        expected = codebook.detach() - 0.1 * gradient
        expected[0] = 0
        loss(net[0].weight).backward()
        optimizer.step()
    torch.testing.assert_close(net[0].weight.data, expected[weight.codes])


def test_each_stage_of_deep_compression_is_smaller():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(300, 200))
    net[0].weight.data *= torch.rand_like(net[0].weight) < 0.1
    hardware.share_weights(net, 4, layers=["0"])
    size = hardware.compressed_size(net[0].weight, 4, 5)
    assert size.dense == 32 * 60_000
    assert size.dense > size.pruned > size.shared > size.huffman > 0
    stored = formats.EIE.encode(net[0].weight.T, 1, index_bits=5, reset="stream")
    assert size.shared == stored.count * 9 + 16 * 32
    codes, zeros = stored.entries()
    coded = [formats.Huffman.encode(s, n) for s, n in ((codes, 16), (zeros, 32))]
    assert size.huffman == sum(c.bits for c in coded) + 16 * 32
    assert (coded[0].decode() == codes).all()
    assert (coded[1].decode() == zeros).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, "bits=9; codes have 1 to 8 bits"),
        ({"layers": ["7"]}, "matches nothing"),
    ],
)
def test_what_cannot_be_shared_is_refused_and_nothing_changes(options, message):
    net = pruned_net()
    before = net[0].weight.clone()
    with pytest.raises(ValueError, match=message):
        hardware.share_weights(net, **options)
    assert torch.equal(net[0].weight, before)


def test_an_optimizer_of_another_model_is_refused():
    net = pruned_net()
    before = net[0].weight.clone()
    other = torch.optim.SGD(pruned_net().parameters(), 0.1)
    with pytest.raises(ValueError, match="the optimizer does not train 0, 2"):
        hardware.share_weights(net, layers=["0", "2"], optimizer=other)
    assert torch.equal(net[0].weight, before)
