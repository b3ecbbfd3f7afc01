"""Images in folders that are their classes, which have the same number in all splits."""

from __future__ import annotations

import io
import logging
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from timm.utils.misc import natural_key

from prunus.report.records import is_main

log = logging.getLogger("prunus")
SPLITS = (("train", "training"), ("validation", "val", "valid", "eval", "evaluation", "test"))
ENDINGS = {".jpg", ".jpeg", ".png"}
Entry = tuple[tuple[str, ...], Any]
"""the parts of a path, and where the file is; None for a folder"""


class Split:
    """The ``.../<class>/<image>`` of a folder or tar; a reader for timm's ImageDataset.

    With `name` only ``.../<name>/<class>/<image>``. A folder without folders in it is a class even
    if it has no images, unless it is hidden: notebooks leave such behind.
    """

    def __init__(self, path: Path, entries: Iterable[Entry], name: str | None = None) -> None:
        self.told = f"{path}: {name}" if name else str(path)
        self.path = path
        self.drawn: list[int] = []
        """images that were asked for since somebody emptied this"""
        self.images: list[tuple[str, Any]] = []
        """class, and the file, or the first byte and the number of bytes in the tar"""
        folders = set()
        for parts, where in entries:
            folder = parts if where is None else parts[:-1]
            if not folder or (name and folder[-2:-1] != (name,)):
                continue
            if where is None:
                folders.add(folder)
            elif os.path.splitext(parts[-1])[1].lower() in ENDINGS:
                self.images.append((folder[-1], where))
        leaves = folders - {folder[:-1] for folder in folders}
        empty = {leaf[-1] for leaf in leaves if not leaf[-1].startswith(".")}
        # natural_key takes 01 for 1, of which another process may see the other first
        names = sorted(empty | self.shown(), key=lambda name: (natural_key(name), name))
        self.numbers = {name: number for number, name in enumerate(names)}

    def shown(self) -> set[str]:
        """The classes of which there are images."""
        return {name for name, _ in self.images}

    def number_as(self, train: Split) -> None:
        """Raises ValueError for images of a class that the training split lacks."""
        if lacking := sorted(self.shown() - train.numbers.keys(), key=natural_key):
            more = f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""
            raise ValueError(
                f"{self.told} has classes that {train.told} lacks: {', '.join(lacking[:5])}{more}; "
                "make a folder for each there, which may be empty: they number the classes"
            )
        self.numbers = train.numbers

    def filename(self, index: int) -> str:
        """What timm says of an image that cannot be read."""
        return f"{self.told}, {self.images[index]}"

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[str | io.BytesIO, int]:
        name, where = self.images[index]
        self.drawn.append(index)
        if isinstance(where, str):
            return where, self.numbers[name]
        begin, size = where
        with self.path.open("rb") as file:  # a handle of its own for each loading process
            file.seek(begin)
            return io.BytesIO(file.read(size)), self.numbers[name]


def in_folder(path: Path) -> Iterator[Entry]:
    for root, _, files in os.walk(path, followlinks=True):
        parts = Path(root).relative_to(path).parts
        yield parts, None
        yield from (((*parts, name), os.path.join(root, name)) for name in files)


def in_tar(path: Path) -> list[Entry]:
    """Raises ValueError for a file that is compressed or no tar."""
    if path.suffixes[-2:] == [".tar", ".gz"] or path.suffix == ".tgz":
        raise ValueError(f"{path}: images in a compressed tar have no places; gunzip it first")
    try:
        with tarfile.open(path, "r:") as tar:
            found = [m for m in tar if m.isfile() or m.isdir()]
    except tarfile.ReadError as error:
        raise ValueError(
            f"{path} cannot be read as a tar that is not compressed ({error}); decompress it"
        ) from None
    return [(Path(m.name).parts, (m.offset_data, m.size) if m.isfile() else None) for m in found]


def synonyms(split: str) -> Sequence[str]:
    """The names a split goes by, itself first."""
    names = next((names for names in SPLITS if split in names), ())
    return (split, *(name for name in names if name != split))


def place(root: Path, split: str) -> Path | None:
    """The tar or folder of a split within a folder."""
    named = (root / f"{name}{ending}" for name in synonyms(split) for ending in (".tar", ""))
    return next((path for path in named if path.exists()), None)


def read_split(root: Path, whole: list[Entry] | None, split: str) -> Split | None:
    """Of the tar `root`, which holds `whole`, or of the folder `root`; None if there is none."""
    if whole is not None:
        named = (Split(root, whole, name) for name in synonyms(split))
        return next((found for found in named if found.numbers), None)
    path = place(root, split)
    if path is None:
        return None
    if path.is_file():
        return Split(path, in_tar(path))
    found = Split(path, in_folder(path))
    found.images.sort(key=lambda image: (natural_key(image[1]), image[1]))  # timm's order
    return found


def open_split(root: Path, split: str, train: str) -> Split:
    """The images of a split, whose classes have the numbers of the split `train`.

    Without that one they are numbered as they are, which the log says. Raises ValueError with the
    remedy for what cannot be read.
    """
    whole = in_tar(root) if root.is_file() else None
    found = read_split(root, whole, split)
    if found is None and whole is None:
        raise ValueError(
            f"{root} has no folder or tar for the split {split!r}, {_told(root)}; make one, or "
            "name another with --train-split or --val-split"
        )
    if found is None or not found.images:
        within = f"{split}/" if whole is not None else ""
        path = root if found is None else found.path
        raise ValueError(f"{path} has no images in a folder {within}<class>/; give it one")
    if whole is None and found.path == place(root, train):
        return found
    base = read_split(root, whole, train)
    if base is not None and base.numbers:
        found.number_as(base)
    elif is_main():
        log.warning("%s has no split %r: classes are numbered as in %s", root, train, found.told)
    return found


def _told(root: Path) -> str:
    """The folders and tars of a folder, a few of them, in words."""
    found = sorted(p.name for p in root.glob("*") if p.is_dir() or p.suffix == ".tar")
    more = ", ..." if len(found) > 10 else ""
    return f"only {', '.join(found[:10])}{more}" if found else "nor any other"
