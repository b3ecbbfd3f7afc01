"""Images for the programs that prune vision models: datasets, loaders, and evaluation.

A batch's pixels and labels are a function of the seed, the epoch and the number of the batch alone:
neither how many workers load them nor where a run was interrupted changes them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, create_dataset, create_loader
from torch import nn
from torch.utils.data import Dataset, IterableDataset, Sampler

from prunus.core.ranks import Ranks

from research import demo
from research.common.image_folders import SPLITS, Split, open_split

DIGITS = "digits"
BITS = (1 << 64) - 1
Autocast = Callable[[], Any]


def mixed(*numbers: int) -> int:
    """64 bits that look random, the same for the same numbers (splitmix64's finalizer, chained)."""
    x = 0
    for number in numbers:
        x = (x + number + 0x9E3779B97F4A7C15) & BITS
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & BITS
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & BITS
        x ^= x >> 31
    return x


def seed_all(*numbers: int) -> None:
    """Python's, numpy's and torch's random numbers from here on, on all devices."""
    seed = mixed(*numbers)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    # torch.manual_seed takes a millisecond where there are devices that are not in use
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


class Digits(Dataset[tuple[Any, int]]):
    """Scikit-learn's 8x8 digits as pictures: 1,437 to train on, 360 to evaluate on."""

    def __init__(self, training: bool, mode: str) -> None:
        images, labels = demo.digits()[0 if training else 1]
        self.pixels = ((images[:, 0] + 1) * 127.5).round().byte().numpy()
        self.labels, self.mode = labels.tolist(), mode
        self.transform: Callable[[Any], Any] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.pixels[index]).convert(self.mode)
        return self.transform(image) if self.transform else image, self.labels[index]


class Images(ImageDataset):
    """Images of folders or tars; what cannot be read is replaced by its successor, and counted."""

    def __init__(self, root: str, reader: Split, input_img_mode: str) -> None:
        super().__init__(root, reader=reader, input_img_mode=input_img_mode)
        # in memory that the processes which load images share
        self.broken = torch.zeros(len(reader), dtype=torch.bool).share_memory_()

    def __getitem__(self, index: int) -> Any:
        self.reader.drawn.clear()
        try:
            return super().__getitem__(index)
        finally:
            if len(self.reader.drawn) > 1:
                self.broken[self.reader.drawn[:-1]] = True


def broken_images(batches: Any, ranks: Ranks) -> int:
    """How many images of a loader could not be read as yet, on all ranks; each once."""
    images: Any = getattr(batches, "dataset", None)
    images = getattr(images, "images", images)
    broken = getattr(images, "broken", None)
    return 0 if broken is None else int(ranks.all_reduce(broken.int()).count_nonzero())


def open_dataset(
    data_dir: str | None, name: str, split: str, in_chans: int, train: str = "train"
) -> Dataset[Any]:
    """Pictures and labels: ``digits``, a folder, a tar, or what timm's `create_dataset` knows.

    A tar holds ``train`` and ``val`` folders of classes, or a folder holds ``train.tar`` and
    ``val.tar``. Classes are numbered as in the split ``train``. Raises ValueError with the remedy
    for what cannot be read.
    """
    mode = "L" if in_chans == 1 else "RGB"
    if "/" in name:
        more = {} if name.startswith("torch/") else {"input_img_mode": mode}
        return indexed(create_dataset(name, data_dir, split, **more), name)
    if data_dir == DIGITS:
        return Digits(split in SPLITS[0], mode)
    if data_dir is None or not Path(data_dir).exists():
        raise ValueError(f"there is no data in {data_dir!r}; give --data-dir a folder, or 'digits'")
    # whatever the dataset's name: CAP says --dataset imagenet for a folder
    reader = open_split(Path(data_dir), split, train)
    return Images(data_dir, reader, mode)


def check_classes(images: Any, model: Any) -> None:
    """Raises ValueError where the images have more classes than the model, if both are known."""
    digits = isinstance(images, Digits)
    count = 10 if digits else len(getattr(getattr(images, "reader", None), "numbers", ()))
    if count > getattr(model, "num_classes", count):
        raise ValueError(
            f"the images have {count} classes, the model {model.num_classes}; give --num-classes "
            f"{count} and weights for as many"
        )


def indexed(dataset: Any, name: str) -> Dataset[Any]:
    """Itself. Raises ValueError for a stream."""
    if isinstance(dataset, IterableDataset):
        raise ValueError(f"{name} is a stream, which has no order to resume in; use files instead")
    return dataset


class Numbered(Dataset[Any]):
    """Images whose random changes depend on the number of their batch, in whatever process."""

    def __init__(self, images: Dataset[Any]) -> None:
        self.images: Any = images
        self.transform: Callable[[Any], Any] | None = None
        """given by timm's `create_loader`"""

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, drawn: Sequence[tuple[int, int]]) -> list[tuple[Any, int]]:
        """A batch, of which the first image's number counts."""
        assert self.transform is not None
        seed_all(drawn[0][0])
        found = (self.images[index] for _, index in drawn)
        return [(self.transform(image), target) for image, target in found]


class Order(Sampler[tuple[int, int]]):
    """This rank's images of an epoch: (random number, index), whole batches only.

    ``epoch`` is asked for at the beginning of each pass. With ``repeats`` an epoch has as many
    images, but each of them so many times, changed differently ("repeated augmentation").
    """

    def __init__(
        self, images: int, batch_size: int, seed: int, ranks: Ranks, repeats: int = 0
    ) -> None:
        self.images, self.seed, self.ranks, self.repeats = images, seed, ranks, max(1, repeats)
        self.size = images // ranks.world_size // batch_size * batch_size
        if self.size == 0:
            raise ValueError(
                f"{images} images on {ranks.world_size} processes do not fill a batch of "
                f"{batch_size}; use smaller batches"
            )
        self.epoch: Callable[[], int] = lambda: 0
        self.begin = 0
        """how many images of the next pass to leave out, those of batches that are done"""

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, begin, self.begin = self.epoch(), self.begin, 0
        generator = torch.Generator().manual_seed(mixed(self.seed, epoch))
        order = torch.randperm(self.images, generator=generator).repeat_interleave(self.repeats)
        mine = order[self.ranks.rank :: self.ranks.world_size][begin : self.size].tolist()
        for place, index in enumerate(mine, begin):
            yield mixed(self.seed, epoch, place, self.ranks.rank), index


def training_loader(images: Dataset[Any], order: Order, **settings: Any) -> Any:
    """timm's loader, in our order. ``settings`` are those of `create_loader`."""
    made = create_loader(Numbered(images), **settings)
    made.batch_sampler.sampler = order  # create_loader takes none, and a new epoch asks this one
    return made


def evaluation_loader(images: Any, ranks: Ranks, **settings: Any) -> Any:
    """timm's loader of every image once, dealt out to the ranks."""
    made = create_loader(images, is_training=False, **settings)
    made.batch_sampler.sampler = range(ranks.rank, len(images), ranks.world_size)
    return made


@torch.no_grad()
def evaluate(model: nn.Module, batches: Any, autocast: Autocast, ranks: Ranks) -> dict[str, float]:
    """Mean cross-entropy, and top-1 and top-5 accuracy in percent, over the images of all ranks.

    And ``broken``, where images could not be read: so many were replaced by others.
    """
    was_training = model.training
    model.eval()
    totals = torch.zeros(4, dtype=torch.float64, device=next(model.parameters()).device)
    for images, labels in batches:
        with autocast():
            output = model(images)
        output = output.float()
        hits = output.topk(min(5, output.shape[1])).indices == labels[:, None]
        loss = nn.functional.cross_entropy(output, labels, reduction="sum")
        totals += torch.stack([loss, hits[:, 0].sum(), hits.sum(), totals.new_tensor(len(labels))])
    model.train(was_training)
    loss, first, fifth, count = ranks.all_reduce(totals).tolist()
    found = {"loss": loss / count, "top1": 100 * first / count, "top5": 100 * fifth / count}
    broken = broken_images(batches, ranks)
    return {**found, "broken": float(broken)} if broken else found
