"""Weights that are sharded over ranks (FSDP2's DTensors), and sums over ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from prunus.core.layers import Layer
from prunus.core.masks import Masks
from prunus.core.patterns import Pattern
from prunus.solvers import selection
from prunus.stats import Statistic

_ALONE = "failed_between_collectives"


@contextmanager
def alone(when: bool = True) -> Iterator[None]:
    """For a stretch with collectives in it: what fails there is raised without asking the others.

    They are waiting in the next collective and would take the question for a part of that. The
    process that ends by the error ends them too: their launcher or backend sees it gone.
    """
    try:
        yield
    except Exception as error:
        if when:
            setattr(error, _ALONE, True)
        raise


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
        moved = t.to(self._device(t.device), copy=True).contiguous()
        dist.all_reduce(moved, group=self.group)
        return moved.to(t.device)

    def _device(self, device: torch.device) -> torch.device | str:
        """The device itself, or one that the ranks can talk through."""
        backends = dist.get_backend_config(self.group).split(",")  # "cpu:gloo,cuda:nccl"
        devices = [backend.split(":")[0] for backend in backends]
        return device if device.type in devices else devices[0]

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """One vector for each rank, exchanged for those from each that are as long as the own."""
        sizes = [part.numel() for part in parts]
        device = self._device(parts[0].device)
        sent = torch.cat(list(parts)).to(device)
        got = sent.new_empty(self.world_size * sizes[self.rank])
        dist.all_to_all_single(got, sent, [sizes[self.rank]] * self.world_size, sizes, self.group)
        return list(got.to(parts[0].device).chunk(self.world_size))

    def keep_all_but_lowest(self, scores: Tensor, k: int) -> Tensor:
        """This rank's part of the keep-mask that drops the k lowest scores of all ranks."""
        if self.group is not None:
            k = selection.count_lowest([scores], k, self.all_reduce, self.rank, self.world_size)[0][
                0
            ]
        return selection.keep_all_but_lowest(scores, k)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails on one rank fails on all; the others would wait for it for ever.

        Raises RuntimeError on the ranks that did not fail themselves. What has failed in `alone` is
        raised on its own rank only.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            if self.group is not None and getattr(caught, _ALONE, False):
                raise
            error = caught
        if self.group is not None:
            said: list[Any] = [None] * self.world_size
            mine = error and f"{type(error).__name__}: {error}"
            dist.all_gather_object(said, mine, group=self.group)
            if error is None and any(said):
                rank, message = next((r, text) for r, text in enumerate(said) if text)
                raise RuntimeError(f"rank {rank} failed with {message}")
        if error is not None:
            raise error


def row_cuts(rows: int, world_size: int, unit: int = 1) -> list[tuple[int, int]]:
    """Consecutive shares of the rows, as equal as multiples of `unit` allow; late ones may be 0."""
    units = rows // unit
    ends = [units * (rank + 1) // world_size * unit for rank in range(world_size)]
    return list(zip([0, *ends], ends, strict=False))


def in_step(items: Iterator[Any], shards: Shards, all_needed: bool) -> Iterator[Any]:
    """The items, as long as any rank has one (None where it has run out), or as long as all have.

    What fails on one rank fails on all.
    """
    while shards.group is not None:
        item, error = None, None
        try:
            item = next(items, None)
        except Exception as caught:
            error = caught
        have, failed = shards.all_reduce(
            torch.tensor([int(item is not None), int(error is not None)])
        ).tolist()
        if failed:
            with shards.together():
                if error is not None:
                    raise error
        if have == 0 or (all_needed and have < shards.world_size):
            return
        yield item
    yield from items


def all_ranks() -> Shards:
    """Every rank there is, each with data of its own."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return Shards(dist.group.WORLD, dist.get_rank(), dist.get_world_size())
    return Shards()


def _cuts(weight: Tensor) -> list[tuple[int, int]]:
    """(mesh dimension, tensor dimension) of each way the weight is cut."""
    placements = getattr(weight, "placements", ())
    return [(i, p.dim) for i, p in enumerate(placements) if p.is_shard()]


def ranks_of(weight: Tensor) -> Shards:
    """The ranks that hold the parts of one weight."""
    cuts = _cuts(weight)
    if not cuts:
        return Shards()
    group = getattr(weight, "device_mesh").get_group(cuts[0][0])  # noqa: B009 (a DTensor's)
    return Shards(group, dist.get_rank(group), dist.get_world_size(group))


def cut_along_inputs(layer: Layer) -> bool:
    """Whether a rank has only some of the columns of the layer's matrix."""
    return any(dim != layer.rows_dim for _, dim in _cuts(layer.weight))


def shards_of(layers: Sequence[Layer], pattern: Pattern) -> Shards:
    """Where the layers lie.

    Raises ValueError, on every rank, for weights cut in a way a pattern cannot be counted on.
    """
    cuts = {layer: _cuts(layer.weight) for layer in layers}
    if not any(cuts.values()):
        return Shards()
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
    """Share of the masked weights that are pruned, over all ranks; every rank must call this."""
    counts = torch.zeros(2, dtype=torch.int64)
    for name, mask in masks.items():
        mine = torch.tensor([mask.numel(), int(mask.count_nonzero())])
        counts += ranks_of(masks.weight(name)).all_reduce(mine)
    size, kept = counts.tolist()
    return float((size - kept) / max(1, size))


def _as_sharded(part: Tensor, like: Any) -> Any:
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(part, mesh, placements, shape=like.shape, stride=like.stride())


def gather(part: Tensor, like: Tensor) -> Tensor:
    """The whole of a tensor cut as the DTensor `like`; `part` itself where that is no DTensor."""
    if not hasattr(like, "to_local"):
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
    if not hasattr(like, "to_local"):
        return whole
    result: Tensor = _as_sharded(scatter(whole, like).contiguous(), like)
    return result


def all_reduce_statistics(stats: Iterable[Statistic]) -> None:
    """Add statistics up over all data-parallel ranks, in place; shared ones once."""
    everyone = all_ranks()
    for stat in {id(stat): stat for stat in stats}.values() if everyone.group is not None else ():
        for tensor in stat.tensors():
            tensor.copy_(everyone.all_reduce(tensor))
