"""Compact files hold each tensor in its smallest format, and files of before are still read."""

import json

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import save_file
from torch import nn

import prunus
from prunus import formats, hardware


def header_of(path):
    with safetensors.safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["prunus"])


def sparse_net(dtype=torch.float32):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(256, 256), nn.Conv2d(8, 8, 3), nn.Linear(256, 64), nn.Linear(8, 8)
    )
    for layer, density in ((net[0], 2.0), (net[1], 0.3), (net[2], 0.003)):
        layer.weight.data *= torch.rand_like(layer.weight) < density
    groups = net[0].weight.data.view(-1, 4)
    groups *= groups.abs().argsort(1).argsort(1) == 3
    return net.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_each_tensor_takes_its_smallest_format(tmp_path, dtype):
    net = sparse_net(dtype)
    prunus.save(net, tmp_path / "net.safetensors", compact=True)
    stored = header_of(tmp_path / "net.safetensors")["formats"]
    assert {name: entry["format"] for name, entry in stored.items()} == {
        "0.weight": "nm",
        "1.weight": "bitmask",
        "2.weight": "csr",
    }
    twin = sparse_net(dtype)
    for p in twin.parameters():
        p.data.zero_()
    checkpoint = prunus.load(tmp_path / "net.safetensors", twin)
    for name, t in net.state_dict().items():
        assert torch.equal(checkpoint.state_dict[name], t)
        assert torch.equal(twin.state_dict()[name], t)
    assert set(checkpoint.masks) == {"0.weight", "1.weight", "2.weight"}


def test_shared_weights_are_stored_as_codes(tmp_path):
    net = nn.Sequential(nn.Linear(256, 256, bias=False))
    net[0].weight.data *= torch.rand_like(net[0].weight) < 0.2
    hardware.share_weights(net, layers=["0"])
    path = tmp_path / "net.safetensors"
    prunus.save(net, path, compact=True)
    assert header_of(path)["formats"]["0.weight"]["format"] == "eie"
    assert path.stat().st_size < 0.25 * formats.encode(net[0].weight, "bitmask").nbytes
    assert torch.equal(prunus.load(path).state_dict["0.weight"], net[0].weight)


def test_files_written_before_there_was_a_choice_are_read(tmp_path):
    """What version 1 wrote: one bit for each weight, highest first, and the values that are left."""
    w = torch.tensor([[0.0, 1.0, 0.0], [2.0, 0.0, -3.0]])
    parts = {
        "weight.bits": torch.from_numpy(np.packbits((w != 0).numpy().reshape(-1))),
        "weight.values": w[w != 0],
        "bias": torch.ones(2),
        "tied": torch.ones(2),
    }
    header = {
        "version": 1, "recipe": None, "masks": {"weight": [0]},
        "compact": {"weight": [2, 3]}, "aliases": {"again": "weight"},
    }  # fmt: skip
    path = tmp_path / "old.safetensors"
    save_file(parts, path, metadata={"format": "pt", "prunus": json.dumps(header)})
    checkpoint = prunus.load(path)
    assert torch.equal(checkpoint.state_dict["weight"], w)
    assert torch.equal(checkpoint.state_dict["again"], w)
    expected = w != 0
    expected[0, 0] = True
    assert torch.equal(checkpoint.masks["weight"], expected)


def test_compress_finds_the_fewest_bits():
    torch.manual_seed(0)
    for density in (0.002, 0.05, 0.5, 1.0):
        w = torch.randn(128, 256) * (torch.rand(128, 256) < density)
        stored = formats.compress(w)
        assert torch.equal(stored.decode(), w)
        sizes = formats.sizes(w, ("dense", "bitmask", "csr", "csc"))
        assert stored.bits == min(sizes.values())
