"""Weights that are sharded over ranks (FSDP2's DTensors)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from prunus.layers import Layer
from prunus.masking import local
from prunus.patterns import Pattern


@dataclass(frozen=True)
class Shards:
    """The ranks among which the rows of the layers are cut; a single one where they are not."""

    group: Any = None
    rank: int = 0
    world_size: int = 1

    def all_reduce(self, t: Tensor) -> Tensor:
        """The sum over the ranks, in the dtype and on the device of `t`."""
        if self.group is None:
            return t
        nccl = "nccl" in dist.get_backend(self.group)
        moved = t.to("cuda" if nccl else "cpu", copy=True)
        dist.all_reduce(moved, group=self.group)
        return moved.to(t.device)


def _shard_dims(weight: Tensor) -> list[tuple[int, int]]:
    """(mesh dimension, tensor dimension) of each way the weight is cut."""
    placements = getattr(weight, "placements", ())
    return [(i, p.dim) for i, p in enumerate(placements) if p.is_shard()]


def shards_of(layers: Sequence[Layer], pattern: Pattern) -> Shards:
    """Where the layers lie.

    Raises ValueError for weights cut in a way a pattern cannot be counted on.
    """
    cut = {layer: _shard_dims(layer.weight) for layer in layers}
    if not any(cut.values()):
        return Shards()
    for layer, dims in cut.items():
        if len(dims) != 1:
            how = "in several directions" if dims else "not at all, and others are"
            raise ValueError(f"{layer.name} is sharded {how}; shard all pruned layers alike")
        if dims[0][1] != layer.rows_dim and pattern.kind != "unstructured":
            raise ValueError(
                f"{layer.name} is sharded along its inputs, so pattern '{pattern}' "
                "cannot be counted; use 'unstructured', or exclude it"
            )
        part = layer.local
        if part.numel():
            rows, cols = layer.matrix_shape(tuple(part.shape))
            pattern.check(rows, cols, layer.channels(tuple(part.shape)))
    mesh = getattr(layers[0].weight, "device_mesh")  # noqa: B009 (a DTensor's)
    group = mesh.get_group(cut[layers[0]][0][0])
    return Shards(group, dist.get_rank(group), dist.get_world_size(group))


def gather(part: Tensor, like: Tensor) -> Tensor:
    """The whole of a tensor cut as the DTensor `like`; `part` itself where that is no DTensor."""
    if not hasattr(like, "to_local"):
        return part
    from torch.distributed.tensor import DTensor

    whole = DTensor.from_local(
        part,
        like.device_mesh,
        like.placements,
        run_check=False,  # type: ignore[attr-defined]
        shape=like.shape,
        stride=like.stride(),
    )
    return whole.full_tensor()


def scatter(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor, cut as the DTensor `like`."""
    if not hasattr(like, "to_local"):
        return whole.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return local(distribute_tensor(whole.to(mesh.device_type), mesh, placements))


def all_reduce_statistics(tensors: Sequence[Tensor]) -> None:
    """Add statistics up over all data-parallel ranks, in place."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        everyone = Shards(dist.group.WORLD, dist.get_rank(), dist.get_world_size())
        for tensor in tensors:
            tensor.copy_(everyone.all_reduce(tensor))
