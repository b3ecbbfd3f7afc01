"""Saving sparse models: safetensors, dense or compact, written atomically.

Dense files have the plain model's keys, so any loader reads them. Compact files store each sparse
tensor in whichever of `prunus.formats` takes least, its parts as ``name.part``; those that were
written before there was a choice have ``name.bits`` and ``name.values``, and are read as ever.
Both carry the masks and the recipe in the metadata. A mask is where the stored weight is not zero,
but for the few kept weights that happen to be zero, whose positions are written beside it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from prunus import formats
from prunus.api.results import Result
from prunus.api.session import Session
from prunus.core.files import atomic_write
from prunus.core.masks import count_zeros, local
from prunus.core.names import did_you_mean
from prunus.core.ranks import Ranks, first_rank_tells
from prunus.core.sharding import gather, ranks_of, shard
from prunus.core.tensor_files import open_tensors
from prunus.core.wrappers import clean_name, is_sharded, unwrap
from prunus.engine.permute.gather import BUFFER, restore_gathers
from prunus.recipe import Recipe
from prunus.report.records import is_main

log = logging.getLogger("prunus")
KEY = "prunus"


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds. ``state_dict`` is dense, whatever form the file has.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    >>> result = prunus.prune(model, "magnitude", sparsity=0.5)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     prunus.save(model, f"{folder}/model.safetensors", pruning=result)
    ...     prunus.load(f"{folder}/model.safetensors")
    Checkpoint(4 tensors, 1 masks, sparsity 0.5000)
    """

    state_dict: dict[str, Tensor]
    masks: dict[str, Tensor]
    """parameter name -> keep-mask, True means kept"""
    recipe_yaml: str | None

    @property
    def recipe(self) -> Recipe | None:
        """What the model was pruned with. Raises RecipeError where its pruner is not registered."""
        return None if self.recipe_yaml is None else Recipe.load(self.recipe_yaml)

    def __repr__(self) -> str:
        pruned = sum(int((~mask).sum()) for mask in self.masks.values())
        size = sum(mask.numel() for mask in self.masks.values())
        share = f"{len(self.masks)} masks, sparsity {pruned / max(1, size):.4f}"
        return f"Checkpoint({len(self.state_dict)} tensors, {share})"


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    pruning: Session | Result | None = None,
    compact: bool = False,
) -> None:
    """Write a model to a safetensors file; what was there stays until the new file is complete.

    ``pruning`` (what `attach` or `prune` returned) adds masks and recipe; without it, every Linear
    and convolution weight that has zeros counts as masked there. ``compact`` shrinks the file with
    the sparsity; only `load` reads it. The first rank writes. Sharded weights are gathered, so
    every rank must call this; with DDP all may, and then wait until the file is there.

    Raises OSError if the disk is full or the path not writable (RuntimeError on the other ranks),
    and ValueError for a model whose state is not all tensors with data; the old file is then
    intact.

    >>> model = nn.Linear(4, 4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     prunus.save(model, f"{folder}/model.safetensors")
    ...     os.listdir(folder)
    ['model.safetensors']
    """
    parts = {clean_name(name): t for name, t in unwrap(model).state_dict().items()}
    for name, t in parts.items():
        if reason := _not_writable(t):
            raise ValueError(f"{name!r} {reason}")
    cuts = (ranks_of(t) for t in parts.values() if is_sharded(t))
    shards = next(cuts, Ranks())
    state = _gathered(parts, parts)
    if isinstance(pruning, Session) and not pruning.closed:
        pruning.verify("saving")
    masks = {} if pruning is None else _gathered(pruning.masks, parts)
    followed = shards.group is None and isinstance(model, DistributedDataParallel)
    with shards.raise_on_all_ranks(), first_rank_tells(f"save {path}", followed):
        if is_main():
            _write(path, state, masks, pruning, compact)


def _not_writable(t: Any) -> str:
    """Why safetensors cannot hold it; empty if it can."""
    hold = "safetensors files hold tensors with data only"
    quantized = "save a model that was quantized by torch with torch.save"
    if not isinstance(t, Tensor):
        return f"is no tensor but a {type(t).__name__}; {hold}; {quantized}"
    if t.is_quantized:
        return f"is {t.dtype}, which safetensors files do not hold; {quantized}"
    return f"is on the meta device; {hold}" if t.is_meta else ""


def _write(
    path: str | os.PathLike[str],
    state: dict[str, Tensor],
    masks: dict[str, Tensor],
    pruning: Session | Result | None,
    compact: bool,
) -> None:
    if pruning is None:
        masks = {
            name: t != 0
            for name, t in state.items()
            if t.dim() > 1 and t.is_floating_point() and count_zeros(t)
        }
    header: dict[str, Any] = {
        "version": 2 if compact else 1,
        "recipe": None if pruning is None else pruning.recipe.to_yaml(),
        "masks": _written(masks, state),
    }
    tensors = {name: t.detach().contiguous() for name, t in state.items()}
    if compact:
        tensors, header["formats"], header["aliases"] = _compact(tensors)
    tensors = _unshared(tensors)
    with atomic_write(path) as draft:
        try:
            save_file(tensors, draft, metadata={"format": "pt", KEY: json.dumps(header)})
        except safetensors.SafetensorError as error:
            raise OSError(f"cannot write '{path}' ({error}); what was there is intact") from None


def _gathered(parts: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole tensors of what is cut as `like`; on the first rank, nothing on the others."""
    result = {}
    for name, part in parts.items():
        whole = gather(local(part), like[name])
        if is_main():
            result[name] = whole if whole is part else whole.cpu()
    return result


def _kept_zeros(weight: Tensor, mask: Tensor) -> list[int]:
    return (mask.to(weight.device) & (weight == 0)).reshape(-1).nonzero().squeeze(1).tolist()


def _written(masks: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """The masks that hold in the weights; the log names the others, as while a mask decays."""
    written, dropped = {}, []
    for name, mask in masks.items():
        off = int((state[name] != 0).logical_and_(~mask.to(state[name].device)).sum())
        if off:
            dropped.append(f"{name} ({off} of {mask.numel()} weights)")
        else:
            written[name] = _kept_zeros(state[name], mask)
    if dropped:
        log.warning(
            "saved without masks, because pruned weights are not zero: %s", ", ".join(dropped)
        )
    return written


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tied tensors cloned, since safetensors refuses memory that two keys share."""
    seen: set[int] = set()
    result = {}
    for name, t in tensors.items():
        pointer = t.untyped_storage().data_ptr() if t.numel() else -1
        result[name] = t.clone() if pointer in seen else t
        seen.add(pointer)
    return result


def _compact(
    tensors: dict[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]], dict[str, str]]:
    """Tensors in their smallest format, how the sparse ones are stored, and tied names."""
    result: dict[str, Tensor] = {}
    stored: dict[str, dict[str, Any]] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    for name, t in tensors.items():
        key = t.data_ptr(), t.shape, t.stride()  # a transposed one has other entries
        if t.numel() and key in first:
            aliases[name] = first[key]
            continue
        first[key] = name
        encoded = formats.compress(t) if t.is_floating_point() else None
        if encoded is None or encoded.nbytes >= t.nbytes:
            result[name] = t
            continue
        parts = encoded.tensors()
        result.update((f"{name}.{part}", tensor) for part, tensor in parts.items())
        stored[name] = {"format": encoded.name, "parts": list(parts), **encoded.options()}
    return result, stored, aliases


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> Checkpoint:
    """Read what `save` wrote, and any other safetensors file; into ``model`` too where given.

    Raises ValueError if it is no safetensors file, or does not fit the model, which is then
    untouched.

    >>> model, again = nn.Linear(4, 4), nn.Linear(4, 4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     prunus.save(model, f"{folder}/model.safetensors")
    ...     checkpoint = prunus.load(f"{folder}/model.safetensors", again)
    >>> torch.equal(model.weight, again.weight)
    True
    """
    from prunus.api.file_header import expand, masks_of, read_header  # with pydantic: it is slow

    with open_tensors(path) as file:
        text = (file.metadata() or {}).get(KEY, "{}")
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    try:
        header = read_header(text)
        state = expand(stored, header)
        masks = masks_of(state, header)
    except ValueError as error:
        raise ValueError(f"'{path}': {error}") from None
    checkpoint = Checkpoint(state, masks, header.recipe)
    if model is not None:
        _load_into(model, state, path)
    return checkpoint


def _load_into(model: nn.Module, state: Mapping[str, Tensor], path: Any) -> None:
    target = unwrap(model)
    gathers = {name: t for name, t in state.items() if name.rpartition(".")[2] == BUFFER}
    parts = target.state_dict()
    names = {clean_name(name): name for name in parts}
    for name in names:
        if name not in state:
            raise ValueError(f"'{path}' has no {name!r}{did_you_mean(name, state)}")
    for name, t in state.items():
        if name in gathers:
            continue
        if name not in names:
            raise ValueError(f"'{path}' has {name!r}, the model has not{did_you_mean(name, names)}")
        if parts[names[name]].is_meta:
            raise ValueError(
                f"{name!r} of the model is on the meta device and holds no data; call "
                "model.to_empty(device='cpu') first"
            )
        shape = tuple(parts[names[name]].shape)
        if tuple(t.shape) != shape:
            raise ValueError(f"'{path}' has {name!r} as {tuple(t.shape)}, the model as {shape}")
    for name, t in parts.items():
        if not isinstance(t, Tensor) or (
            t.is_inference() and not torch.is_inference_mode_enabled()
        ):
            raise ValueError(
                f"{clean_name(name)!r} of the model cannot be written to: it was made inside "
                "torch.inference_mode, or is no tensor (quantized by torch); load into a model "
                "that is neither, and quantize it then"
            )
    restore_gathers(target, gathers)
    parts = target.state_dict()
    names = {clean_name(name): name for name in parts}
    target.load_state_dict({names[n]: shard(t, parts[names[n]]) for n, t in state.items()})
