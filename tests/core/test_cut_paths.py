"""Chains through which nothing passes are those whose Jacobian is zero for a reason of weights."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import prunus
from prunus.core.cut_paths import cut_paths


class Positive(nn.Sequential):
    """Weights, inputs and activations that never cancel or go inactive."""

    def __init__(self, widths, density, seed):
        torch.manual_seed(seed)
        layers = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Linear(a, b, bias=False), nn.ReLU()]
        super().__init__(*layers[:-1])
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.rand_like(p) + 0.5).mul_(torch.rand_like(p) < density)


@given(
    widths=st.lists(st.integers(1, 4), min_size=3, max_size=5),
    density=st.sampled_from([0.2, 0.4, 0.6]),
    seed=st.integers(0, 500),
)
@settings(deadline=None, max_examples=80)
def test_a_chain_is_cut_where_its_output_is_zero_and_no_layer_is(widths, density, seed):
    model = Positive(widths, density, seed)
    dead = not model(torch.ones(1, widths[0])).any()
    empty = not all(p.any() for p in model.parameters())
    cut = cut_paths(model)
    assert not cut or dead
    if dead and not empty:
        assert len(cut) == 1


def cut_pair(first, second):
    """The first of two layers writes half of its channels, the second reads the others."""
    with torch.no_grad():
        first.weight[: len(first.weight) // 2] = 0
        half = second.weight.shape[1] // 2
        second.weight[:, half:] = 0
    return first, second


BETWEEN = {
    "activation": ([nn.GELU(), nn.Dropout()], True),
    "norm": ([nn.BatchNorm2d(4), nn.SiLU(), nn.MaxPool2d(2)], True),
    "mixing": ([nn.Softmax(1)], False),
    "another norm": ([nn.GroupNorm(1, 4)], False),
    "of one's own": ([type("Own", (nn.Module,), {"forward": lambda self, x: x.flip(1)})()], False),
}


@pytest.mark.parametrize("between", BETWEEN)
def test_what_mixes_channels_or_is_not_known_ends_no_path(between):
    modules, expected = BETWEEN[between]
    first, second = cut_pair(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3))
    model = nn.Sequential(first, nn.Sequential(*modules), second, nn.Flatten(), nn.Linear(6, 2))
    assert bool(cut_paths(model)) is expected


def test_flattened_pictures_are_followed():
    first, last = nn.Conv2d(3, 4, 3), nn.Linear(4 * 9, 5)
    model = nn.Sequential(first, nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), last)
    cut_pair(first, last)
    assert cut_paths(model) == ["4"]
    first.weight.data[0] = 1.0  # the last layer reads channel 0
    assert cut_paths(model) == []


def test_grouped_and_empty_layers_are_left_to_others():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight.data.zero_()
    assert cut_paths(model) == []  # told as collapsed
    grouped = nn.Sequential(nn.Conv1d(4, 4, 1, groups=2), nn.Conv1d(4, 4, 1))
    cut_pair(*grouped)
    assert cut_paths(grouped) == []


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(*cut_pair(nn.Linear(4, 4), nn.Linear(4, 4)))

    def forward(self, x):
        return x + self.branch(x)


def test_a_branch_that_is_cut_is_named_by_its_layer():
    assert cut_paths(nn.ModuleList([Residual()])) == ["0.branch.1"]


def bottleneck():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.uniform_(0.5, 1.0)
        model[0].weight[2:] *= 1e-3
        model[2].weight[:, :2] *= 1e-3
    return model


def test_pruning_without_data_names_the_cut_in_log_result_and_report(caplog, tmp_path):
    pytest.importorskip("matplotlib")
    result = prunus.prune(
        bottleneck(), "magnitude", sparsity=0.5, layers=["0", "2"], allocator="uniform"
    )
    assert result.cut == ["2"]
    assert "cut: nothing passes 2, because" in str(result)
    assert "cut: nothing passes 2, because" in caplog.text
    result.report(tmp_path)
    assert "<b>Cut:</b> nothing passes 2," in (tmp_path / "report.html").read_text()
    again = prunus.prune(bottleneck(), "magnitude", sparsity=0.3, allocator="uniform")
    assert not again.cut


def test_a_session_names_a_cut_once_and_not_one_that_was_there_before(caplog):
    recipe = """
modifiers:
  - prune:
      layers: ["0", "2"]
      allocator: uniform
      sparsity: {from: 0.1, to: 0.6}
      window: {from: 0step, to: 4step, every: 1step}
"""
    model = bottleneck()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    for expected in (1, 1):
        with prunus.attach(model, optimizer, recipe.replace("0.1", "0.6", expected == 2)):
            for _ in range(5):
                model(torch.ones(1, 4)).sum().backward()
                optimizer.step()
        assert caplog.text.count("cut: nothing passes 2") == expected
        recipe = recipe.replace("from: 0.1", "from: 0.6")
