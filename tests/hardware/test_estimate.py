"""An estimate counts what a slow walk over every multiplication counts."""

import json

import pytest
import torch
from torch import nn

from prunus import formats, hardware, spatial
from prunus.hardware import Machine, estimate


def sparsify(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data *= torch.rand(p.shape, generator=generator) < 0.4
    return module


def sparse_input(*shape):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator)
    return x.relu()


CASES = {
    "linear": (nn.Linear(12, 7), (5, 12)),
    "linear over tokens": (nn.Linear(12, 7), (2, 5, 12)),
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1, stride=2), (2, 4, 11)),
    "conv2d": (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 8, 9)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, dilation=2), (2, 4, 8, 9)),
    "same": (nn.Conv2d(4, 6, 3, padding="same"), (1, 4, 8, 9)),
    "circular": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (1, 4, 8, 9)),
    "conv3d": (nn.Conv3d(2, 3, 2), (1, 2, 4, 5, 6)),
}


@pytest.mark.parametrize("case", CASES)
def test_effective_macs_are_the_products_of_two_nonzeros(case):
    module, shape = CASES[case]
    module, x = sparsify(module), sparse_input(*shape)
    (row,) = estimate(nn.Sequential(module), x).layers
    # one product of ones for each pair of nonzeros: the layer itself counts them
    counter = type(module).__new__(type(module))
    counter.__dict__.update(module.__dict__)
    counter._parameters = {"weight": nn.Parameter((module.weight != 0).double()), "bias": None}
    counted = counter((x != 0).double())
    assert row.effective_macs == int(counted.sum().round())
    counter._parameters["weight"] = nn.Parameter(torch.ones_like(module.weight))
    assert row.macs == counted.numel() * module.weight[0].numel()
    assert row.input_sparsity == pytest.approx(float((x == 0).float().mean()))


def test_transposed_convolutions_multiply_each_input_with_its_channel():
    module, x = sparsify(nn.ConvTranspose2d(3, 4, 2, stride=2)), sparse_input(2, 3, 5, 5)
    (row,) = estimate(nn.Sequential(module), x).layers
    per_channel = (module.weight != 0).flatten(1).sum(1)
    assert row.macs == x.numel() * 16
    assert row.effective_macs == int(((x != 0).sum((0, 2, 3)) * per_channel).sum())


def pruned_net():
    torch.manual_seed(0)
    return sparsify(nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 10)))


def test_sizes_are_those_of_the_encoded_weights():
    net = pruned_net()
    result = estimate(net, torch.randn(3, 40))
    for layer, weight in zip(result.layers, (net[0].weight, net[2].weight), strict=True):
        for form in ("dense", "bitmask", "csr", "csc"):
            assert layer.bits[form] == formats.encode(weight, form).bits
        assert layer.smallest == min(
            ("dense", "bitmask", "csr", "csc"), key=lambda form: layer.bits[form]
        )
    assert "2:4" not in result.layers[0].bits
    assert result.other_bits == 32 * (64 + 10)


def test_cycles_are_those_of_the_products_on_the_example():
    net, x = pruned_net(), torch.randn(6, 40)
    machine = Machine(elements=8)
    result = estimate(net, x, machine=machine, vectors=6)
    hidden = net[1](net[0](x)).detach()
    mask = (net[2].weight != 0).numpy()
    runs = hardware.run_all(machine, mask, (hidden != 0).numpy())
    assert result.layers[1].eie_cycles == sum(run.cycles for run in runs)
    assert result.layers[1].input_sparsity == pytest.approx(float((hidden == 0).float().mean()))


def test_the_table_and_the_json_say_the_same():
    result = estimate(pruned_net(), torch.randn(3, 40))
    data = json.loads(result.to_json())
    assert data["total"]["macs"] == 3 * (40 * 64 + 64 * 10) == result.total("macs")
    assert data["layers"][0]["bits"] == result.layers[0].bits
    text = str(result)
    assert "prunus bench" in text
    assert "45 nm" in text
    assert "<td>64x40</td>" in result._repr_html_()


def test_a_report_has_numbers_page_and_picture(tmp_path):
    page = estimate(pruned_net(), torch.randn(3, 40)).report(tmp_path / "run")
    assert {p.name for p in page.parent.iterdir()} == {
        *("estimate.json", "estimate.png", "estimate.html"),
    }


def test_layers_that_are_not_called_are_named_and_still_sized():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
            self.head = nn.Linear(16, 4)

        def forward(self, x):
            return self.head(self.attention(x, x, x)[0])

    result = estimate(Net(), torch.randn(2, 3, 16))
    skipped = [layer for layer in result.layers if layer.macs is None]
    assert [layer.name for layer in skipped] == ["attention.in_proj_weight", "attention.out_proj"]
    assert all(layer.bits["dense"] == 32 * layer.rows * layer.columns for layer in skipped)
    assert "not called as modules, so sizes only: attention.in_proj_weight" in str(result)


def test_a_layer_called_twice_works_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            return self.layer(self.layer(x))

    (row,) = estimate(Twice(), torch.randn(5, 8)).layers
    assert row.macs == 2 * 5 * 64


def test_modes_hooks_and_weights_are_as_before():
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.BatchNorm1d(4).eval())
    before = {name: t.clone() for name, t in net.state_dict().items()}
    estimate(net, torch.randn(3, 4))
    assert [m.training for m in net] == [True, True, False]
    assert not net[0]._forward_hooks
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_inputs_may_be_positional_or_by_keyword():

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x, scale):
            return self.inner(x) * scale

    for inputs in ((torch.ones(2, 4), 3.0), {"x": torch.ones(2, 4), "scale": 3.0}):
        assert estimate(Outer(), inputs).layers[0].macs == 32


def test_no_vectors_are_refused():
    with pytest.raises(ValueError, match="vectors=0; use at least 1"):
        estimate(nn.Linear(2, 2), torch.ones(1, 2), vectors=0)


def test_sparse_convolutions_are_counted_against_the_whole_grid():

    dense = sparse_input(2, 3, 6, 7) * (torch.rand(2, 1, 6, 7) < 0.3)
    conv = sparsify(spatial.SubMConv2d(3, 5, 3, bias=False))
    (row,) = estimate(conv, spatial.SparseTensor.from_dense(dense)).layers
    assert row.macs == 2 * 6 * 7 * 27 * 5
    assert row.input_sparsity == pytest.approx(float((dense == 0).float().mean()))
    ones = nn.functional.conv2d((dense != 0).double(), (conv.weight != 0).double(), padding=1)
    sites = (dense != 0).any(1, keepdim=True)
    assert row.effective_macs == int((ones * sites).sum())
    assert row.eie_cycles > 0
