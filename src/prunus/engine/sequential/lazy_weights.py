"""Weights of a model on the meta device, read from safetensors files when their turn comes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from prunus.core.files import atomic_write
from prunus.core.names import did_you_mean
from prunus.core.tensor_files import OF_TORCH, of_torch, open_tensors
from prunus.core.wrappers import clean_name

INDEX = "model.safetensors.index.json"


def write_atomically(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file that is there whole or not at all."""
    whole = {name: t.detach().contiguous() for name, t in tensors.items()}
    with atomic_write(path) as draft:
        save_file(whole, draft, {"format": "pt"})


class Weights:
    """The tensors of one safetensors file or of all in a folder, by name.

    A file of the bare transformer may lack the first part of the model's names, or have one more.

    Raises ValueError if there is no such file, or one that is not safetensors.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        files = [self.path] if self.path.is_file() else sorted(self.path.glob("*.safetensors"))
        if not files:
            torch_files = [file for end in OF_TORCH for file in sorted(self.path.glob(f"*{end}"))]
            if torch_files:
                raise ValueError(of_torch(torch_files[0]))
            raise ValueError(f"'{path}' is no safetensors file, nor a folder with any")
        self.files: dict[str, Path] = {}
        for file in files:
            with open_tensors(file) as opened:
                self.files.update(dict.fromkeys(opened.keys(), file))

    def _key(self, name: str) -> str:
        if name in self.files:
            return name
        near = [k for k in self.files if k.endswith(f".{name}") or name.endswith(f".{k}")]
        if len(near) != 1:
            raise ValueError(
                f"'{self.path}' has no tensor {name!r}{did_you_mean(name, self.files)}"
            )
        return near[0]

    def read(self, name: str) -> Tensor:
        """Raises ValueError if there is no tensor of this name."""
        key = self._key(name)
        with open_tensors(self.files[key]) as opened:
            tensor: Tensor = opened.get_tensor(key)
        return tensor


def _on_meta(module: nn.Module, prefix: str, skip: Set[nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for inner_name, inner in module.named_modules(prefix=prefix):
        if inner in skip:
            continue
        for key, t in [*inner._parameters.items(), *inner._buffers.items()]:
            name = clean_name(f"{inner_name}.{key}" if inner_name else key)
            if t is None or not t.is_meta:
                continue
            if key in inner._non_persistent_buffers_set:
                raise ValueError(
                    f"{name} is on the meta device and in no file; build the model so that buffers "
                    "are real, as with accelerate.init_empty_weights()"
                )
            yield name, t


@torch.no_grad()
def materialize(
    module: nn.Module, name: str, weights: Weights, skip: Set[nn.Module] = frozenset()
) -> list[Tensor]:
    """Fill what is on the meta device, but for modules in `skip`; Parameters stay the same objects.

    ``name`` is the module's. Returns what was filled. Raises ValueError for what is in no file; all
    is on the meta device again then.
    """
    filled: list[Tensor] = []
    try:
        for key, t in _on_meta(module, name, skip):
            read = weights.read(key)
            if read.shape != t.shape:
                raise ValueError(
                    f"{key} is {tuple(t.shape)} in the model, and {tuple(read.shape)} in "
                    f"'{weights.path}'"
                )
            _replace(t, read.to(t.dtype))
            filled.append(t)
    except BaseException:
        release(filled)
        raise
    return filled


@torch.no_grad()
def release(tensors: list[Tensor]) -> None:
    """Back to the meta device."""
    for t in tensors:
        _replace(t, torch.empty_like(t, device="meta"))


def _replace(t: Tensor, value: Tensor) -> None:
    if isinstance(t, nn.Parameter):
        value = nn.Parameter(value, requires_grad=t.requires_grad)
    torch.utils.swap_tensors(t, value)  # type: ignore[no-untyped-call]


@torch.no_grad()
def move(module: nn.Module, device: torch.device | str) -> None:
    """As `Module.to`, but buffers stay the same objects, as parameters do.

    Whoever knows a buffer by itself, as a fold or `detach` do, then still has the module's.
    """
    buffers = [(m, key, t) for m in module.modules() for key, t in m._buffers.items()]
    module.to(device)
    for inner, key, t in buffers:
        now = inner._buffers[key]
        if t is not None and now is not None and now is not t:
            t.data = now
            inner._buffers[key] = t


def write_index(folder: Path, files: Sequence[str]) -> None:
    """The table by which loaders find each tensor among these files of a folder."""
    table, size = {}, 0
    for file in [folder / name for name in files]:
        with open_tensors(file) as opened:
            table.update(dict.fromkeys(opened.keys(), file.name))
        size += file.stat().st_size
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": table}, indent=1)
    with atomic_write(folder / INDEX) as draft:
        draft.write_text(text)
