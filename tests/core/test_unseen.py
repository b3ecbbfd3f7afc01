"""Weights that are no layers are counted and told, and transformed ones are not called sparse."""

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import prunus
from prunus.core.layers import all_layers
from prunus.core.selection import select
from prunus.core.transformed import is_transformed
from prunus.core.unseen import told, unseen_weights


class Own(nn.Module):
    """Somebody's own linear layer, and a tensor that nobody knows."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 8, 16))
        self.weight = nn.Parameter(torch.randn(16, 16))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.lstm = nn.LSTM(8, 8)
        self.own = Own()
        self.fc = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 10)
        self.head.weight = self.embed.weight  # tied: seen as the head's


def test_what_is_no_layer_is_listed_the_largest_first_and_tied_weights_once():
    found = [(item.name, item.kind, item.size) for item in unseen_weights(Model())]
    assert found == [
        ("own.table", "Own", 384),
        ("own.weight", "Own", 256),
    ]


def test_totals_count_all_weights_of_two_and_more_axes(caplog):
    caplog.set_level(logging.INFO, logger="prunus")
    model = Model()
    whole = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    result = prunus.prune(model, "magnitude", sparsity=0.5, layers=["fc"])
    table = prunus.sparsity(model)
    assert result.sparsity == 0.5
    assert table.total == 32 / whole
    line = f"not seen, dense: {640 / whole:.1%} of the model's weights: own.table (Own, 384), own.w"
    for text in (str(result), str(table)):
        assert line in " ".join(text.split())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    prunus.attach(model, optimizer, "modifiers: [prune: {sparsity: 0.6, layers: [fc]}]").close()
    assert line in caplog.text
    assert told(nn.Linear(2, 2)) == ""


@pytest.mark.parametrize("pattern", ["*table*", "Own", "own", "re:own.weight"])
def test_a_pattern_that_names_such_weights_is_explained(pattern):
    with pytest.raises(ValueError, match=r"names own\.\w+ \(Own\), which prunus does not know as"):
        select(Model(), [pattern])


@pytest.mark.parametrize("pattern", ["LSTM", "lstm*", "re:lstm.weight_.*"])
def test_recurrent_weights_are_layers(pattern):
    names = [layer.name for layer in select(Model(), [pattern]).layers]
    assert names == ["lstm.weight_ih_l0", "lstm.weight_hh_l0"]


class Standardized(nn.Conv2d):
    """Weight standardization, as in timm's StdConv2d."""

    def forward(self, x):
        w = self.weight.flatten(1)
        w = (w - w.mean(1, keepdim=True)) / (w.std(1, keepdim=True) + 1e-5)
        return F.conv2d(x, w.reshape(self.weight.shape), self.bias, self.stride, self.padding)


class PadsItself(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias, self.stride)


class NormedLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x, F.normalize(self.weight, dim=1), self.bias)


class Doubled(nn.Linear):
    def forward(self, x):
        return F.linear(x, 2 * self.weight, self.bias)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (Standardized(4, 6, 3), True),
        (NormedLinear(8, 4), True),
        (PadsItself(4, 6, 3), False),
        (Doubled(8, 4), False),
        (nn.Conv2d(4, 6, 3), False),
        (nn.Linear(8, 4), False),
    ],
)
def test_a_weight_that_is_transformed_before_use_is_found_by_trying(module, expected):
    (layer,) = all_layers(nn.Sequential(module))
    assert is_transformed(layer) is expected


def test_the_arguments_of_a_convolution_that_pads_by_itself_are_not_its_inputs():
    (layer,) = all_layers(nn.Sequential(PadsItself(4, 6, 3)))
    assert not layer.reads_arguments
    assert not layer.no_inputs()
    with pytest.raises(ValueError, match="PadsItself does not compute with its arguments as they"):
        layer.input_matrix(torch.randn(2, 4, 9, 9))


def test_transformed_weights_stay_dense_by_default_and_are_refused_by_name(caplog):
    caplog.set_level(logging.INFO, logger="prunus")
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), Standardized(4, 6, 3), nn.Conv2d(6, 6, 1), nn.Flatten(), nn.Linear(6, 2)
    )
    chosen = select(model)
    assert [layer.name for layer in chosen.layers] == ["2"]
    assert chosen.left_dense == ["0", "1", "4"]
    assert "1 (its weight is transformed before use" in caplog.text
    with pytest.raises(ValueError, match=r"1\.weight is transformed by Standardized before use"):
        select(model, ["1"])


def test_timms_own_convolutions_are_told_apart():
    layers = pytest.importorskip("timm.layers")
    made = layers.Conv2dSame(4, 6, 3), layers.StdConv2d(4, 6, 3), layers.ScaledStdConv2d(4, 6, 3)
    found = [is_transformed(layer) for layer in all_layers(nn.Sequential(*made))]
    assert found == [False, True, True]


def test_adapters_of_peft_are_not_pruned_by_default():
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 4))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0", "2"]))
    names = [layer.name for layer in select(model).layers]
    assert names
    assert not [name for name in names if "lora" in name]
