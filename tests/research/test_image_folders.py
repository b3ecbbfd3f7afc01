"""Images in folders that are their classes: which number a class has."""

import contextlib
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageDataset

from prunus.core.ranks import Ranks

from tests.research import training_runs as training_workers  # noqa: F401 - shows where the programs are

# isort: split
from research.common import vision_data
from research.common.image_folders import Split

TRAIN = {"kind0": 3, "kind1": 3, "kind2": 3, "kind10": 0}
VAL = {"kind0": 2, "kind2": 2, "kind10": 1}
KINDS = pytest.mark.parametrize("kind", ["folder", "tars", "one.tar"])


def pack(tar, root, content):
    subprocess.run(["tar", "-cf", str(tar), "-C", str(root), content], check=True)


@pytest.fixture
def uneven(tmp_path):
    """Nothing of kind1 to evaluate on, nor of kind10 to train on: a folder, two tars, and one."""
    noise = np.random.default_rng(0)
    (tmp_path / "tars").mkdir()
    for split, counts in (("train", TRAIN), ("val", VAL)):
        folder = tmp_path / "folder" / split
        for name, count in counts.items():
            (folder / name).mkdir(parents=True)
            for i in range(count):
                pixels = noise.integers(0, 255, (4, 4, 3), np.uint8)
                Image.fromarray(pixels).save(folder / name / f"{i}.png")
        (folder / ".hidden").mkdir()
        pack(tmp_path / "tars" / f"{split}.tar", folder, ".")
    pack(tmp_path / "one.tar", tmp_path, "folder")
    return tmp_path


def labels(path, split, train="train"):
    data = vision_data.open_dataset(str(path), "", split, 3, train)
    return sorted(data[i][1] for i in range(len(data)))


@KINDS
def test_classes_have_the_numbers_of_the_training_split(uneven, kind, caplog):
    """In natural order; kind10 has one though there is nothing of it to train on."""
    assert labels(uneven / kind, "train") == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert labels(uneven / kind, "validation") == [0, 0, 2, 2, 3]
    assert not caplog.messages


@KINDS
def test_without_a_training_split_classes_are_numbered_as_they_are(uneven, kind, caplog):
    assert labels(uneven / kind, "val", "train2") == [0, 0, 1, 1, 2]
    (said,) = caplog.messages
    assert "has no split 'train2': classes are numbered as in" in said
    assert labels(uneven / kind, "val", "validation") == [0, 0, 1, 1, 2]
    assert len(caplog.messages) == 1  # to calibrate on the same images was asked for


@KINDS
def test_a_class_that_the_training_split_lacks_is_refused(uneven, kind):
    with pytest.raises(ValueError, match=r"train\S* has classes that .* lacks: kind1; make a f"):
        labels(uneven / kind, "train", train="val")


def test_images_beside_the_classes_have_none(uneven):
    for split in ("train", "val"):
        shutil.copy(uneven / "folder/val/kind0/0.png", uneven / "folder" / split)
    assert labels(uneven / "folder", "val") == [0, 0, 2, 2, 3]
    for name in VAL:
        shutil.rmtree(uneven / "folder/val" / name)
    with pytest.raises(ValueError, match="val has no images in a folder <class>/; give it one"):
        labels(uneven / "folder", "val")


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm's
def test_a_folder_is_read_as_timm_reads_it(uneven):
    """Images in its order, with its labels."""
    for i in (10, 9):
        shutil.copy(uneven / "folder/train/kind0/0.png", uneven / f"folder/train/kind1/{i}.png")
    ours = vision_data.open_dataset(str(uneven / "folder"), "", "train", 3)
    theirs = ImageDataset(str(uneven / "folder" / "train"))
    assert len(ours) == len(theirs) == 11
    assert [path for _, path in ours.reader.images] == theirs.filenames(absolute=True)
    for i in range(11):
        assert ours[i][1] == theirs[i][1]
        assert ours[i][0].tobytes() == theirs[i][0].tobytes()


def test_names_with_the_same_number_have_one_order(tmp_path):
    """Whichever a process finds first."""
    names = ["001", "01", "1", "B", "b"]
    for order in (names, names[::-1]):
        found = Split(tmp_path, [((name, "0.png"), "") for name in order])
        assert found.numbers == {name: i for i, name in enumerate(names)}


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_cannot_be_read_are_counted_once_and_told_with_the_metrics(uneven, workers):
    folder = uneven / "folder" / "val"
    (folder / "kind0" / "1.png").write_bytes(b"no image")
    (folder / "kind10" / "0.png").write_bytes((folder / "kind10" / "0.png").read_bytes()[:40])
    data = vision_data.open_dataset(str(uneven / "folder"), "", "val", 3)
    data.transform = lambda image: torch.from_numpy(np.array(image)).float().permute(2, 0, 1)
    batches = torch.utils.data.DataLoader(data, batch_size=2, num_workers=workers)
    assert vision_data.broken_images(batches, Ranks()) == 0
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 4))
    for _ in range(2):
        found = vision_data.evaluate(model, batches, contextlib.nullcontext, Ranks())
        assert found["broken"] == 2
    numbered = vision_data.Numbered(data)
    assert vision_data.broken_images(torch.utils.data.DataLoader(numbered), Ranks()) == 2
    whole = vision_data.open_dataset(str(uneven / "folder"), "", "train", 3)
    whole.transform = data.transform
    found = vision_data.evaluate(
        model, torch.utils.data.DataLoader(whole), contextlib.nullcontext, Ranks()
    )
    assert "broken" not in found
