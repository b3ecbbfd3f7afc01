"""A broken file is one ValueError with the file and the key, and the model stays as it was."""

import contextlib
import json
import random

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

import prunus


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = net()
    path = tmp_path_factory.mktemp("files") / "m.safetensors"
    result = prunus.prune(model, "magnitude", sparsity=0.9)
    prunus.save(model, path, pruning=result, compact=True)
    with safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["prunus"])
        return path, header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def refused(path, match):
    model = net(1)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        prunus.load(path, model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


WRONG = [None, [], 5, "x", {"nope": [1]}, {"2.weight": None}, {"2.weight": "x"}, {"2.weight": [-1]}]
WRONG += [
    {"2.weight": [1.5]},
    {"2.weight": {}},
    {"2.weight": [10**9]},
    {"nope": {"format": "csr", "parts": ["a"]}},
]
WRONG += [{"nope": "gone"}, {"2.weight": [2**40]}]


@pytest.mark.parametrize("value", WRONG, ids=str)
@pytest.mark.parametrize("key", ["compact", "masks", "aliases", "formats"])
def test_a_wrong_value_in_the_header_is_named(key, value, saved, tmp_path):
    _, header, tensors = saved
    path = tmp_path / "bad.safetensors"
    text = json.dumps({**header, key: value})
    safetensors.torch.save_file(tensors, path, metadata={"prunus": text})
    refused(path, f"bad.safetensors': .*({key}|weight|nope)")


@pytest.mark.parametrize("text", ["{nope", "[1]", "null", "3", '{"version": 3}', '{"recipe": 5}'])
def test_a_header_that_is_none_is_named(text, saved, tmp_path):
    path = tmp_path / "bad.safetensors"
    safetensors.torch.save_file(saved[2], path, metadata={"prunus": text})
    refused(path, "bad.safetensors'.*(JSON|header|version|recipe)")


PARTS = {
    "gone": lambda t: None,
    "short": lambda t: t[:-1],
    "one": lambda t: t[:1],
    "long": lambda t: torch.cat([t, t[:3]]),
    "complex": lambda t: t.to(torch.complex64),
}


@pytest.mark.parametrize("change", PARTS.values(), ids=PARTS)
def test_parts_that_do_not_fit_each_other_are_named(change, saved, tmp_path):
    _, header, tensors = saved
    assert header["formats"]["2.weight"]["format"] == "bitmask"
    for part in ("mask", "values"):
        name, path = f"2.weight.{part}", tmp_path / "bad.safetensors"
        changed = change(tensors[name])
        if changed is not None and changed.dtype.is_complex and part == "values":
            continue  # a bit mask of complex numbers is a thing
        others = {key: t for key, t in tensors.items() if key != name}
        others |= {} if changed is None else {name: changed.contiguous()}
        safetensors.torch.save_file(others, path, metadata={"prunus": json.dumps(header)})
        refused(path, "2.weight")


def test_flipped_bytes_raise_nothing_but_valueerrors(saved, tmp_path):
    raw, path, choose = saved[0].read_bytes(), tmp_path / "bad.safetensors", random.Random(0)
    for _ in range(200):
        flipped = bytearray(raw)
        for _ in range(choose.choice([1, 3, 10])):
            flipped[choose.randrange(choose.choice([8, 900, len(raw)]))] = choose.randrange(256)
        path.write_bytes(flipped)
        with contextlib.suppress(ValueError):
            prunus.load(path, net(1))


@pytest.mark.parametrize("name", ["m.pth", "m.safetensors"])
def test_a_file_of_torch_save_is_named_with_the_remedy(name, tmp_path):
    torch.save(net().state_dict(), tmp_path / name)
    refused(tmp_path / name, "file of torch.save; read it with model.load_state_dict")


def test_a_model_without_data_is_refused(saved):
    with pytest.raises(ValueError, match="(?s)meta device .*to_empty"):
        prunus.load(saved[0], net().to("meta"))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
def test_small_floats_are_saved_compactly_and_come_back(dtype, tmp_path):
    model, other = (nn.BatchNorm1d(1) for _ in range(2))
    values = (torch.randn(64, 64) * (torch.rand(64, 64) > 0.9)).to(dtype)
    model.register_buffer("q", values)
    other.register_buffer("q", torch.zeros(64, 64, dtype=dtype))
    prunus.save(model, tmp_path / "m.safetensors", compact=True)
    prunus.load(tmp_path / "m.safetensors", other)
    assert torch.equal(other.q.float(), values.float())
