"""Shapes that no config can say, in a small JSON file beside the weights.

A shrunk model remembers its shapes; `save` writes ``weights.safetensors`` and ``weights.json``, and
`load` makes a model as it was before into one of these shapes, then fills it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from prunus.channels.result import Shrunk
from prunus.core.files import atomic_write
from prunus.core.tensor_files import open_tensors

MEMORY = "_prunus_shapes"
VERSION = 1


def remember(model: nn.Module, result: Shrunk) -> None:
    """Note on the model what has changed since it was built; shrinking again adds to it."""
    known = memory(model)
    attributes = {name: dict(values) for name, values in known["attributes"].items()}
    for module, values in result.attributes.items():
        attributes.setdefault(module, {}).update(values)
    setattr(model, MEMORY, {"attributes": attributes, "removed": list(known["removed"])})


def memory(model: nn.Module) -> dict[str, Any]:
    """Attributes that changed, by the modules' names of today, and blocks removed, in order."""
    known: dict[str, Any] = getattr(model, MEMORY, None) or {"attributes": {}, "removed": []}
    return known


def remember_removed(model: nn.Module, container: str, index: int) -> None:
    """Note that a block is gone; those after it are called by the number before."""
    known = memory(model)
    attributes = {
        renumbered(name, container, index): values
        for name, values in known["attributes"].items()
        if not f"{name}.".startswith(f"{container}.{index}.")
    }
    removed = [*known["removed"], [container, index]]
    setattr(model, MEMORY, {"attributes": attributes, "removed": removed})


def renumbered(name: str, container: str, index: int) -> str:
    if not name.startswith(f"{container}."):
        return name
    number, *rest = name.removeprefix(f"{container}.").split(".")
    if number.isdigit() and int(number) > index:
        number = str(int(number) - 1)
    return ".".join([container, number, *rest])


def description(model: nn.Module) -> dict[str, Any]:
    """What `load` needs to know: the shape of each tensor, and attributes that changed."""
    known = memory(model)
    shapes = {name: list(t.shape) for name, t in _tensors(model).items()}
    return {"version": VERSION, "shapes": shapes, **known}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters(remove_duplicate=False)
    return {**dict(named), **dict(model.named_buffers(remove_duplicate=False))}


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the weights to ``path``, and their shapes to the JSON file of the same name."""
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, t in model.state_dict().items():
        t = t.detach().contiguous()
        state[name] = t.clone() if t.data_ptr() in seen and t.numel() else t
        seen.add(t.data_ptr())
    with atomic_write(Path(path)) as draft:
        save_file(state, draft, metadata={"format": "pt"})
    with atomic_write(beside(path)) as draft:
        draft.write_text(json.dumps(description(model)) + "\n")


def beside(path: str | os.PathLike[str]) -> Path:
    return Path(path).with_suffix(".json")


def load(path: str | os.PathLike[str], model: nn.Module) -> None:
    """Give ``model``, built as before it was shrunk, the shapes and the weights that were saved.

    Raises ValueError if the file does not fit the model, which is then as it was.
    """
    with open_tensors(path) as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    text = _read_description(beside(path))
    removed: list[tuple[nn.Module, dict[str, nn.Module | None]]] = []
    try:
        for container, index in text["removed"]:
            removed.append(drop(model, container, index))
        _check(model, text, stored, path)
    except BaseException:
        for owner, modules in reversed(removed):
            owner._modules = modules
        raise
    reshape(model, text)
    model.load_state_dict(stored)


def _read_description(path: Path) -> dict[str, Any]:
    """Raises ValueError unless it is what `description` made."""
    try:
        text = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"'{path}', which holds the shapes of a shrunk model, is missing; copy it beside the "
            "weights, or, for a model that was not shrunk, use prunus.load"
        ) from None
    except ValueError as error:
        raise ValueError(f"'{path}' is no JSON: {error}") from None
    version = text.get("version") if isinstance(text, dict) else None
    if version != VERSION:
        raise ValueError(f"'{path}' has version {version}; this reads {VERSION}")
    if missing := [key for key in ("shapes", "removed", "attributes") if key not in text]:
        raise ValueError(f"'{path}' lacks {missing[0]!r}")
    return dict(text)


def drop(
    model: nn.Module, container: str, index: int
) -> tuple[nn.Module, dict[str, nn.Module | None]]:
    """Take a block out of a list; returns the list and its modules as they were."""
    owner = model.get_submodule(container)
    before = dict(owner._modules)
    left = [module for name, module in before.items() if name != str(index)]
    if len(left) == len(before):
        raise ValueError(f"{container} has no block {index}; it has {len(before)}")
    owner._modules = {str(i): module for i, module in enumerate(left)}
    return owner, before


def _check(
    model: nn.Module, text: Mapping[str, Any], stored: Mapping[str, Tensor], path: Any
) -> None:
    shapes = text["shapes"]
    for name, t in _tensors(model).items():
        if len(shapes.get(name, ())) != t.dim():
            raise ValueError(
                f"'{path}' was saved from another model: it has no {name!r} of {t.dim()} axes"
            )
    for name, t in stored.items():
        if name not in shapes or list(t.shape) != shapes[name]:
            raise ValueError(f"'{path}' and its JSON file disagree about {name!r}")


def reshape(model: nn.Module, text: Mapping[str, Any]) -> None:
    """Make the tensors as large as ``text`` says, without values, and set the attributes."""
    for name, t in _tensors(model).items():
        shape = text["shapes"].get(name)
        if shape is not None and list(t.shape) != shape:
            t.grad = None
            t.data = torch.zeros(shape, dtype=t.dtype, device=t.device)
    for module, values in text["attributes"].items():
        owner = model.config if module == "config" else model.get_submodule(module)
        for attribute, value in values.items():
            old = getattr(owner, attribute, None)
            setattr(owner, attribute, tuple(value) if isinstance(old, tuple) else value)
    known = {"attributes": text["attributes"], "removed": text["removed"]}
    setattr(model, MEMORY, known)
