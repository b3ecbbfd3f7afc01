"""Files of torch.save where safetensors are expected: one message, wherever files are read."""

import pytest
import safetensors.torch
import torch
from torch import nn

import prunus
from prunus.channels.shapes import load as load_shapes
from prunus.engine.sequential.lazy_weights import Weights

READERS = {
    "load": lambda path: prunus.load(path),
    "load into": lambda path: prunus.load(path, nn.Linear(2, 2)),
    "lazy weights": Weights,
    "shapes": lambda path: load_shapes(path, nn.Linear(2, 2)),
}
readers = pytest.mark.parametrize("read", READERS.values(), ids=READERS)


@readers
@pytest.mark.parametrize("name", ["w.pt", "w.pth", "pytorch_model.bin", "w.ckpt", "w.safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_of_torch_save_is_named_with_the_remedy(read, name, zipped, tmp_path):
    if name == "w.safetensors":
        zipped = True  # nothing tells another one from a broken file
    state = nn.Linear(2, 2).state_dict()
    torch.save(state, tmp_path / name, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"file of torch.save; read it with model\.load_state"):
        read(tmp_path / name)


@readers
def test_a_broken_file_is_said_to_be_one(read, tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match=r"'\S*w\.safetensors' is no safetensors file, or a brok"):
        read(tmp_path / "w.safetensors")


def test_a_folder_of_torch_files_is_told_as_such(tmp_path):
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin' is not safetensors but a file of tor"):
        Weights(tmp_path)
    with pytest.raises(ValueError, match="is a folder; name a safetensors file in it"):
        prunus.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"w\.json', which holds the shapes of a shrunk model, is missing; copy it"),
        ("{", "is no JSON"),
        ("[]", "has version None; this reads 1"),
        ('{"version": 1, "shapes": {}}', "lacks 'removed'"),
    ],
)
def test_shapes_that_are_missing_or_broken_are_told(text, message, tmp_path):
    safetensors.torch.save_file(nn.Linear(2, 2).state_dict(), tmp_path / "w.safetensors")
    if text is not None:
        (tmp_path / "w.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_shapes(tmp_path / "w.safetensors", nn.Linear(2, 2))
