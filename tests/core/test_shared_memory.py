"""Weights that share memory: transposed ones are one, and those that share a part are refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import prunus
from prunus.core.layers import all_layers
from prunus.core.shared_memory import overlap, overlapping, places, shares_with_itself

from tests.helpers.training import same, snapshot


def views(base):
    """Of a base of 6x8: any view that indexing, transposing and reshaping make."""
    cut = st.tuples(st.integers(0, 5), st.integers(1, 6), st.integers(1, 3))
    return st.builds(
        lambda rows, cols, flip, flat: _view(base, rows, cols, flip, flat),
        cut, st.tuples(st.integers(0, 7), st.integers(1, 8), st.integers(1, 3)),
        st.booleans(), st.booleans(),
    )  # fmt: skip


def _view(base, rows, cols, flip, flat):
    t = base[rows[0] : rows[0] + rows[1] : rows[2], cols[0] : cols[0] + cols[1] : cols[2]]
    t = t.T if flip else t
    return t.reshape(-1) if flat and t.is_contiguous() else t


BASE = torch.arange(48).view(6, 8)


@settings(deadline=None, max_examples=60)
@given(views(BASE), views(BASE))
def test_overlaps_are_those_of_the_places_written_down(a, b):
    mine, theirs = ({int(i) for i in t.flatten()} for t in (a, b))
    assert overlap(a, b) == (bool(mine & theirs) and mine != theirs)
    assert (places(a) == places(b) and a.data_ptr() == b.data_ptr()) == (mine == theirs)
    assert not shares_with_itself(a)
    assert set(overlapping({"a": a, "b": b, "c": BASE.clone()}, ["a"])) == (
        {("a", "b")} if overlap(a, b) else set()
    )


def test_expanded_tensors_share_memory_with_themselves():
    assert shares_with_itself(torch.zeros(4).expand(3, 4))
    assert shares_with_itself(torch.zeros(10).as_strided((3, 4), (2, 1)))
    assert not shares_with_itself(torch.zeros(3, 1, 4).expand(3, 1, 4))


class Autoencoder(nn.Module):
    def __init__(self, inner=16):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(8, inner), nn.Linear(inner, 8)
        self.decoder.weight = nn.Parameter(self.encoder.weight.detach().t())
        self.middle, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.middle(self.decoder(self.encoder(x).relu())))


@pytest.mark.parametrize("inner", [8, 16])
@pytest.mark.parametrize("pattern", ["2:4", "4x1", "unstructured"])
def test_a_weight_and_its_transpose_are_one_layer(inner, pattern):
    model = Autoencoder(inner)
    share = {} if pattern == "2:4" else {"sparsity": 0.5}
    result = prunus.prune(model, "magnitude", pattern=pattern, **share)
    assert [row.name for row in result.rows] == ["encoder", "middle"]
    assert torch.equal(model.decoder.weight, model.encoder.weight.t())
    assert [row[0] for row in prunus.sparsity(model).rows] == ["encoder", "middle", "head"]
    assert not prunus.sparsity(model).unseen


def test_its_second_name_says_the_first():
    with pytest.raises(ValueError, match="names decoder.weight, which is tied to encoder.weight"):
        prunus.prune(Autoencoder(), "magnitude", sparsity=0.5, layers=["decoder"])


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("inner", [8, 16])
def test_files_hold_a_weight_and_its_transpose(tmp_path, inner, compact):
    model, again = Autoencoder(inner), Autoencoder(inner)
    result = prunus.prune(model, "magnitude", sparsity=0.9)
    prunus.save(model, tmp_path / "m.safetensors", pruning=result, compact=compact)
    prunus.load(tmp_path / "m.safetensors", again)
    assert same(model, again)


def test_a_convolution_and_a_linear_layer_may_be_one_weight():
    conv, linear = nn.Conv2d(8, 4, 1), nn.Linear(8, 4)
    linear.weight = nn.Parameter(conv.weight.detach().view(4, 8))
    assert [layer.name for layer in all_layers(nn.ModuleList([conv, linear]))] == ["0"]


def test_accelerating_leaves_a_transposed_pair_dense():
    model = Autoencoder()
    prunus.prune(model, "magnitude", sparsity=0.9, layers="encoder")
    (row,) = prunus.accelerate(model, torch.randn(2, 8)).rows
    assert row.form == "dense"
    assert "tied to decoder.weight" in row.why


def sharing(part):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    model[1] = nn.Linear(8, 4, bias=False)
    model[1].weight = nn.Parameter(part(model[0].weight.detach()))
    return model


PARTS = {
    "rows": lambda w: w[:4],
    "columns": lambda w: w.view(-1)[8:40].view(4, 8),
    "every other row": lambda w: w[::2],
    "another type": lambda w: w.view(torch.bfloat16).view(-1)[:32].view(4, 8),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("chosen", [["0"], ["1"], ["0", "1"]])
def test_weights_that_share_a_part_are_refused_by_name(part, chosen):
    model = sharing(PARTS[part])
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"[01].weight and [01].weight share a part") as error:
        prunus.prune(model, "magnitude", sparsity=0.5, layers=chosen)
    assert "exclude" in str(error.value)
    assert same(model, before)


def test_weights_side_by_side_in_one_memory_are_pruned():
    flat = torch.randn(128)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    model[0].weight = nn.Parameter(flat[:64].view(8, 8))
    model[1].weight = nn.Parameter(flat[64:].view(8, 8))
    halves = torch.randn(8, 16)
    interleaved = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)])
    interleaved[0].weight = nn.Parameter(halves[:, :8])
    interleaved[1].weight = nn.Parameter(halves[:, 8:])
    for each in (model, interleaved):
        result = prunus.prune(each, "magnitude", pattern="2:4", layers=["0", "1"])
        assert [row.zeros for row in result.rows] == [32, 32]


def test_an_expanded_weight_is_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    model[0].weight = nn.Parameter(torch.randn(8).expand(8, 8))
    with pytest.raises(ValueError, match=r"0.weight has one memory for several entries"):
        prunus.prune(model, "magnitude", sparsity=0.5)
