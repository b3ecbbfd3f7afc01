"""Models whose weights lie on disk are pruned as those in memory."""

import pytest
import torch
from torch import nn

from prunus import Sequential, Wanda

from tests.helpers.blocks import (
    BLOCKS,
    fail_at,
    family,
    gpt2,
    llama,
    meta,
    saved,
    tokens,
    toy,
    walk,
)
from tests.helpers.training import same, snapshot

# transformers' progress bars
pytestmark = pytest.mark.filterwarnings("ignore:IProgress not found")


def check_from_disk(model, tmp_path, load, **arguments):
    """A model whose weights are read block by block, beside the one in memory."""
    weights, folder = saved(model, tmp_path / "dense"), tmp_path / "pruned"
    bare = meta(model)
    parameters = dict(bare.named_parameters())
    how = Sequential(weights=weights, folder=str(folder))
    result = walk(bare, how=how, **arguments)
    assert result.rows == walk(model, **arguments).rows
    assert all(p.is_meta for p in bare.layers.parameters())
    assert all(parameters[name] is p for name, p in bare.named_parameters())
    load(model, folder)
    return folder


def load_and_compare(model, folder):
    from safetensors.torch import load_file

    state = {}
    for file in folder.glob("*.safetensors"):
        state |= load_file(file)
    assert same(model, state)


@pytest.mark.parametrize("arguments", [{}, {"allocator": "owl"}, {"pruner": Wanda(refit=True)}])
def test_a_model_on_disk_is_pruned_as_one_in_memory(arguments, tmp_path):
    check_from_disk(toy(), tmp_path, load_and_compare, **arguments)


@pytest.mark.parametrize("number", range(BLOCKS))
def test_a_killed_run_from_disk_goes_on(number, tmp_path, monkeypatch):
    model = toy()
    weights = saved(model, tmp_path / "dense")
    how = Sequential(weights=weights, folder=str(tmp_path / "pruned"))
    fail_at(monkeypatch, number)
    with pytest.raises(KeyboardInterrupt):
        walk(meta(model), how=how)
    begun = fail_at(monkeypatch, None)
    walk(meta(model), how=how)
    assert begun == [str(i) for i in range(number, BLOCKS)]
    walk(model)
    load_and_compare(model, tmp_path / "pruned")


def test_files_that_do_not_fit_are_refused(tmp_path):
    model = toy()
    weights, folder = saved(model, tmp_path / "dense"), str(tmp_path / "out")
    wide, other = meta(model), meta(model)
    wide.stem = nn.Linear(7, 8, device="meta")
    other.extra = nn.Linear(2, 2, device="meta")
    for bad, message in (
        (wide, r"stem.weight is \(8, 7\) in the model, and \(8, 6\) in"),
        (other, "has no tensor 'extra.weight'"),
    ):
        with pytest.raises(ValueError, match=message):
            walk(bad, how=Sequential(weights=weights, folder=folder))
    with pytest.raises(ValueError, match="is no safetensors file, nor a folder with any"):
        walk(meta(model), how=Sequential(weights=str(tmp_path / "none"), folder=folder))


def test_names_with_or_without_a_first_part_are_found(tmp_path):
    from prunus.engine.sequential.lazy_weights import Weights

    model = toy()
    weights = Weights(saved(model, tmp_path / "dense"))
    assert torch.equal(weights.read("model.layers.0.up.weight"), model.layers[0].up.weight)
    outer = Weights(saved(nn.ModuleDict({"model": model}), tmp_path / "outer"))
    assert torch.equal(outer.read("layers.0.up.weight"), model.layers[0].up.weight)


def empty(make, **settings):
    accelerate = pytest.importorskip("accelerate")
    with accelerate.init_empty_weights():
        return make(**settings)


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_on_disk_becomes_one_that_transformers_loads(tied, tmp_path):
    model = family(llama, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "dense")
    bare, calibration = empty(llama, tie_word_embeddings=tied), tokens()
    how = Sequential(weights=str(tmp_path / "dense"), folder=str(tmp_path / "pruned"))
    result = walk(bare, layers=None, calibration=calibration, how=how)
    assert all(p.is_meta for p in bare.model.layers.parameters())
    assert result.rows == walk(model, layers=None, calibration=calibration).rows
    model.config.save_pretrained(tmp_path / "pruned")
    loaded = type(model).from_pretrained(tmp_path / "pruned", torch_dtype=torch.float32)
    assert same(loaded, snapshot(model))


def test_a_checkpoint_in_several_files_is_read(tmp_path):
    model = family(gpt2)
    model.save_pretrained(tmp_path / "dense", max_shard_size="10KB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 1
    how = Sequential(weights=str(tmp_path / "dense"), folder=str(tmp_path / "pruned"))
    result = walk(empty(gpt2), layers=None, calibration=tokens(), how=how)
    assert result.rows == walk(model, layers=None, calibration=tokens()).rows


def test_buffers_on_the_meta_device_that_no_file_has_are_refused(tmp_path):
    model = family(llama)
    model.save_pretrained(tmp_path / "dense")
    with torch.device("meta"):
        bare = family(llama)
    how = Sequential(weights=str(tmp_path / "dense"), folder=str(tmp_path / "pruned"))
    with pytest.raises(ValueError, match="inv_freq is on the meta device and in no file"):
        walk(bare, layers=None, calibration=tokens(), how=how)
