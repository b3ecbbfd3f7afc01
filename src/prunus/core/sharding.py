"""Weights that are sharded over ranks (FSDP2's DTensors)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from prunus.core.layers import Layer
from prunus.core.mask_registry import Masks
from prunus.core.patterns import Pattern
from prunus.core.ranks import Ranks
from prunus.core.wrappers import is_sharded


def _cuts(weight: Tensor) -> list[tuple[int, int]]:
    """(mesh dimension, tensor dimension) of each way the weight is cut."""
    placements = getattr(weight, "placements", ())
    return [(i, p.dim) for i, p in enumerate(placements) if p.is_shard()]


def any_sharded(layers: Sequence[Layer]) -> bool:
    """Whether ranks hold parts of one of the layers."""
    return any(is_sharded(layer.weight) for layer in layers)


def ranks_of(weight: Tensor) -> Ranks:
    """The ranks that hold the parts of one weight."""
    cuts = _cuts(weight)
    if not cuts:
        return Ranks()
    group = getattr(weight, "device_mesh").get_group(cuts[0][0])  # noqa: B009 (a DTensor's)
    return Ranks(group, dist.get_rank(group), dist.get_world_size(group))


def cut_along_inputs(layer: Layer) -> bool:
    """Whether a rank has only some of the columns of the layer's matrix."""
    return any(dim != layer.rows_dim for _, dim in _cuts(layer.weight))


def shards_of(layers: Sequence[Layer], pattern: Pattern) -> Ranks:
    """Where the layers lie.

    Raises ValueError, on every rank, for weights cut in a way a pattern cannot be counted on.
    """
    cuts = {layer: _cuts(layer.weight) for layer in layers}
    if not any(cuts.values()):
        return Ranks()
    meshes = set()
    for layer, cut in cuts.items():
        if len(cut) != 1:
            how = "in several directions" if cut else "not at all, and others are"
            raise ValueError(f"{layer.name} is sharded {how}; shard all pruned layers alike")
        _check_parts(layer, cut[0][1], pattern)
        meshes.add((getattr(layer.weight, "device_mesh"), cut[0][0]))  # noqa: B009
    if len(meshes) > 1:
        raise ValueError("the layers are sharded over different ranks; prune them separately")
    return ranks_of(layers[0].weight)


def _check_parts(layer: Layer, dim: int, pattern: Pattern) -> None:
    # all ranks' parts on every rank, so that either none raises or all
    if dim != layer.rows_dim:
        if pattern.kind != "unstructured" or getattr(layer.module, "groups", 1) > 1:
            raise ValueError(
                f"{layer.name} is sharded along its inputs, so pattern '{pattern}' "
                "cannot be counted; use 'unstructured', or exclude it"
            )
        return
    world_size = ranks_of(layer.weight).world_size
    size = -(-layer.shape[dim] // world_size)  # as torch.chunk cuts
    for begin in range(0, layer.shape[dim], size):
        part = list(layer.shape)
        part[dim] = min(size, layer.shape[dim] - begin)
        shape = tuple(part)
        try:
            pattern.check(*layer.matrix_shape(shape), layer.channels(shape))
        except ValueError as error:
            raise ValueError(f"{layer.name}, cut over {world_size} ranks: {error}") from None


def whole_sparsity(masks: Masks) -> float:
    """Share of the masked weights that are zero, over all ranks; every rank must call this."""
    counts = torch.zeros(2, dtype=torch.int64)
    for name, zeros in masks.pruned().items():
        count = torch.tensor([masks[name].numel(), zeros])
        counts += ranks_of(masks.weight(name)).all_reduce(count)
    size, pruned = counts.tolist()
    return float(pruned / max(1, size))


def _as_sharded(part: Tensor, like: Any) -> Any:
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(part, mesh, placements, shape=like.shape, stride=like.stride())


def gather(part: Tensor, like: Tensor) -> Tensor:
    """The whole of a tensor cut as the DTensor `like`; `part` itself where that is no DTensor."""
    if not is_sharded(like):
        return part
    whole: Tensor = _as_sharded(part.contiguous(), like).full_tensor()
    return whole


def scatter(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor that every rank has, cut as the DTensor `like`."""
    mesh: Any = getattr(like, "device_mesh", None)
    for mesh_dim, dim in _cuts(like):
        size = -(-whole.shape[dim] // mesh.size(mesh_dim))
        begin = min(mesh.get_local_rank(mesh_dim) * size, whole.shape[dim])
        whole = whole.narrow(dim, begin, min(size, whole.shape[dim] - begin))
    return whole.to(like.device)


def shard(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor that every rank has, cut as `like`; itself where that is no DTensor."""
    if not is_sharded(like):
        return whole
    result: Tensor = _as_sharded(scatter(whole, like).contiguous(), like)
    return result
