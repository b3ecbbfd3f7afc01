import os
import sys

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import prunus
from prunus.core.masks import pack, unpack

from tests.oracles.pruning import small_cnn, small_mlp


@given(st.lists(st.booleans(), max_size=40))
def test_bits_pack_and_unpack(bits):
    mask = torch.tensor(bits, dtype=torch.bool)
    assert pack(mask).numel() == -(-len(bits) // 8)
    assert torch.equal(unpack(pack(mask), mask.shape), mask)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_loads_with_masks_and_recipe(tmp_path, compact, dtype):
    model, other = small_cnn(dtype), small_cnn(dtype)
    result = prunus.prune(model, "magnitude", sparsity=0.8)
    prunus.save(model, tmp_path / "m.safetensors", pruning=result, compact=compact)
    loaded = prunus.load(tmp_path / "m.safetensors", other)
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(loaded.state_dict[name], a)
    assert loaded.recipe == result.recipe
    assert loaded.masks.keys() == result.masks.keys()
    assert repr(loaded) == f"Checkpoint(15 tensors, 3 masks, sparsity {result.sparsity:.4f})"
    assert all(torch.equal(loaded.masks[n], result.masks[n]) for n in result.masks)


def test_dense_files_have_the_plain_keys(tmp_path):
    model = torch.compile(small_mlp(), backend="eager")
    prunus.prune(model, "magnitude", sparsity=0.5)
    prunus.save(model, tmp_path / "m.safetensors")
    plain = safetensors.torch.load_file(tmp_path / "m.safetensors")
    small_mlp().load_state_dict(plain, strict=True)


def test_a_session_saves_its_masks_and_kept_zeros_stay_kept(tmp_path):
    model = small_mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with prunus.attach(model, optimizer, "modifiers:\n  - prune: {sparsity: 0.5}\n") as session:
        model(torch.randn(2, 8)).sum().backward()
        optimizer.step()
    kept = session.masks["2.weight"].nonzero()[0]
    with torch.no_grad():
        model[2].weight[tuple(kept)] = 0.0
    for compact in (False, True):
        prunus.save(model, tmp_path / "m.safetensors", pruning=session, compact=compact)
        loaded = prunus.load(tmp_path / "m.safetensors")
        assert torch.equal(loaded.masks["2.weight"], session.masks["2.weight"])
        assert loaded.recipe == session.recipe


@pytest.mark.parametrize("compact", [False, True])
def test_tied_weights_survive(tmp_path, compact):
    def build():
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        model[1].weight = model[0].weight
        return model

    model, other = build(), build()
    prunus.prune(model, "magnitude", sparsity=0.9, layers=["0"])
    prunus.save(model, tmp_path / "m.safetensors", compact=compact)
    prunus.load(tmp_path / "m.safetensors", other)
    assert torch.equal(other[1].weight, model[0].weight)
    size = (tmp_path / "m.safetensors").stat().st_size
    assert size < 6_000 if compact else size > 32_000


@pytest.mark.parametrize(
    ("pattern", "sparsity"),
    [("unstructured", 0.5), ("unstructured", 0.9), ("2:4", 0.5), ("4x1", 0.75), ("row", 0.75)],
)
def test_compact_files_shrink_as_the_docs_say(tmp_path, pattern, sparsity):
    """A bit for each weight and four bytes for each that is left."""
    model = nn.Sequential(nn.Linear(256, 256, bias=False))
    target = None if pattern == "2:4" else sparsity
    prunus.prune(model, "magnitude", sparsity=target, pattern=pattern, layers=["0"])
    prunus.save(model, tmp_path / "m.safetensors", compact=True)
    n = 256 * 256
    body = n / 8 + 4 * n * (1 - sparsity)
    assert (tmp_path / "m.safetensors").stat().st_size == pytest.approx(body, abs=1_000)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch, error):
    model = small_mlp()
    path = tmp_path / "m.safetensors"
    prunus.save(model, path)
    before = path.read_bytes()

    def broken(tensors, name, metadata):
        name.write_bytes(b"half a file")
        raise error

    monkeypatch.setattr("prunus.api.checkpoint.save_file", broken)
    prunus.prune(model, "magnitude", sparsity=0.5)
    with pytest.raises(type(error)):
        prunus.save(model, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.safetensors"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
def test_a_full_disk_is_one_clear_oserror_and_the_old_file_stays(tmp_path):
    import resource

    path = tmp_path / "m.safetensors"
    prunus.save(small_mlp(), path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = nn.Linear(1000, 1000)
    try:  # the write fails with "file too large" half-way, as it does when the disk is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        with pytest.raises(
            OSError, match="cannot write '.*m.safetensors' .*what was there is intact"
        ):
            prunus.save(large, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_a_file_that_does_not_fit_leaves_the_model_untouched(tmp_path):
    prunus.save(small_mlp(), tmp_path / "m.safetensors")
    other = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 17))
    before = other[0].weight.clone()
    with pytest.raises(ValueError, match=r"has '2.bias' as \(16,\), the model as \(17,\)"):
        prunus.load(tmp_path / "m.safetensors", other)
    with pytest.raises(ValueError, match="has no '5.weight'"):
        prunus.load(tmp_path / "m.safetensors", nn.Sequential(*small_mlp(), nn.Linear(4, 4)))
    assert torch.equal(other[0].weight, before)


def test_weights_load_where_the_pruner_of_their_recipe_is_unknown(tmp_path):
    model = small_mlp()
    result = prunus.prune(model, "magnitude", sparsity=0.5)
    prunus.save(model, tmp_path / "m.safetensors", pruning=result)
    blob = (tmp_path / "m.safetensors").read_bytes()
    (tmp_path / "m.safetensors").write_bytes(blob.replace(b"- prune:", b"- prone:"))
    loaded = prunus.load(tmp_path / "m.safetensors", small_mlp())
    assert torch.equal(loaded.masks["2.weight"], result.masks["2.weight"])
    with pytest.raises(ValueError, match="unknown modifier 'prone'"):
        _ = loaded.recipe


def test_what_is_no_safetensors_file_is_refused_by_name(tmp_path):
    path = tmp_path / "junk.safetensors"
    for junk in (b"", b"PK" * 100):
        path.write_bytes(junk)
        with pytest.raises(ValueError, match=r"junk\.safetensors' is no safetensors file"):
            prunus.load(path, small_mlp())


def test_a_state_that_a_file_cannot_hold_is_refused_by_name(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"scale": 1}

    with pytest.raises(ValueError, match="'0._extra_state' is no tensor"):
        prunus.save(nn.Sequential(Extra(4, 4)), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="'0.weight' is on the meta device"):
        prunus.save(small_mlp().to("meta"), tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("compact", [False, True])
def test_a_module_that_is_called_module_keeps_its_keys(tmp_path, compact):
    def build():
        inner = nn.ModuleDict({"module": nn.Linear(8, 8), "out": nn.Linear(8, 8)})
        return nn.ModuleDict({"a": inner, "out": nn.Linear(8, 2)})

    model, other = build(), build()
    result = prunus.prune(model, "magnitude", sparsity=0.5)
    prunus.save(model, tmp_path / "m.safetensors", pruning=result, compact=compact)
    prunus.load(tmp_path / "m.safetensors", other)
    assert torch.equal(other["a"]["module"].weight, model["a"]["module"].weight)
    if not compact:
        plain = safetensors.torch.load_file(tmp_path / "m.safetensors")
        build().load_state_dict(plain, strict=True)


def test_any_safetensors_file_loads(tmp_path):
    model = small_mlp()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "plain.safetensors")
    loaded = prunus.load(tmp_path / "plain.safetensors", small_mlp())
    assert loaded.recipe is None
    assert loaded.masks == {}
