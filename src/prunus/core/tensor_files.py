"""Reading files of safetensors, and saying what a file is that is none."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors

OF_TORCH = (".pt", ".pth", ".bin", ".ckpt")


@contextmanager
def open_tensors(path: str | os.PathLike[str]) -> Iterator[Any]:
    """The open file, with `keys`, `get_tensor` and `metadata`.

    Raises ValueError with the remedy for a file of `torch.save`, a broken one and a folder, and
    FileNotFoundError for one that is not there.
    """
    if Path(path).is_dir():
        raise ValueError(f"'{path}' is a folder; name a safetensors file in it")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except safetensors.SafetensorError as error:
        message = f"'{path}' is no safetensors file, or a broken one: {error}"
        raise ValueError(of_torch(path) or message) from None


def of_torch(path: str | os.PathLike[str]) -> str:
    """What to do with a file of `torch.save`; empty if it is none.

    >>> from prunus.core.tensor_files import of_torch
    >>> of_torch("weights.pt").partition(";")[0], of_torch("model.safetensors")
    ("'weights.pt' is not safetensors but a file of torch.save", '')
    """
    # those of torch before 1.6 are no zip files
    if Path(path).suffix not in OF_TORCH and not zipfile.is_zipfile(path):
        return ""
    return (
        f"'{path}' is not safetensors but a file of torch.save; read it with "
        "model.load_state_dict(torch.load(path, weights_only=True)), and write it with "
        "prunus.save(model, path)"
    )
