"""Labels: which removable slice each position of a tensor belongs to.

Beside a tensor of shape S stand label maps. A map has as many dimensions as the tensor; where it
has size 1 the label does not depend on that axis, so the map of a convolution's output is
``(1, C, 1, 1)`` however large the image. Label 0 marks a position that nothing can remove. The maps
of one tensor vary over disjoint sets of axes: a tensor is a dense box, and whatever is removed from
it must be slabs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

Shape = tuple[int, ...]
MANY = 4096  # pairs from which on duplicates are dropped


@dataclass(frozen=True, eq=False)
class LabelMap:
    """``ids`` is int32; ``zero`` says that a masked position holds zero."""

    ids: Tensor
    zero: bool = True

    @property
    def axes(self) -> list[int]:
        return [d for d, size in enumerate(self.ids.shape) if size > 1]

    def along(self, dim: int) -> bool:
        return self.ids.shape[dim] > 1


@dataclass(frozen=True)
class Labelled:
    """The shape of a tensor and its maps."""

    shape: Shape
    maps: Sequence[LabelMap] = ()

    def aligned(self, dims: int) -> Labelled:
        """With axes of size 1 in front, as broadcasting adds them."""
        more = (1,) * (dims - len(self.shape))
        maps = [replace(m, ids=m.ids.reshape(more + tuple(m.ids.shape))) for m in self.maps]
        return Labelled(more + self.shape, maps)


def compact(ids: Tensor) -> Tensor:
    """The same labels with size 1 along every axis on which they do not depend."""
    for d, size in enumerate(ids.shape):
        if size > 1:
            first = ids.narrow(d, 0, 1)
            if ids.stride(d) == 0 or bool((ids == first).all()):
                ids = first
    return ids


def mapped(
    shape: Sequence[int], maps: Sequence[LabelMap], op: Callable[[Tensor], Tensor]
) -> Labelled:
    """What a layout operation makes of the maps of a tensor of this shape."""
    results = [replace(m, ids=compact(op(m.ids.expand(tuple(shape))))) for m in maps]
    return Labelled((), [m for m in results if m.ids.numel() > 1])


@dataclass
class Coupling:
    """A union-find over labels, solved once at the end, with reasons for what may not go."""

    count: int = 1
    edges: list[Tensor] = field(default_factory=list)
    frozen: list[tuple[Tensor, str]] = field(default_factory=list)

    def new(self, size: int) -> Tensor:
        """(size,) labels that nothing else has."""
        self.count += size
        return torch.arange(self.count - size, self.count, dtype=torch.int32)

    def unite(self, a: Tensor, b: Tensor, reason: str) -> None:
        """Positions of broadcastable maps that stand for one another go together."""
        a, b = torch.broadcast_tensors(a, b)  # type: ignore[no-untyped-call]
        lone = (a == 0) != (b == 0)
        if lone.any():
            self.freeze((a + b)[lone], f"{reason} joins it with positions that stay")
        pairs = (a != b) & ~lone
        found = torch.stack([a[pairs], b[pairs]], 1)
        if len(found) > MANY:  # as one number each, because sorting rows is slow
            keys = torch.unique(found[:, 0].long() << 32 | found[:, 1].long())
            found = torch.stack([keys >> 32, keys & 0xFFFFFFFF], 1).int()
        if len(found):
            self.edges.append(found)

    def freeze(self, ids: Tensor, reason: str) -> None:
        found = torch.unique(ids)
        if (found := found[found != 0]).numel():
            self.frozen.append((found, reason))

    def components(self) -> Tensor:
        """(count,) the number of the component of each label."""
        from scipy.sparse import coo_matrix  # a quarter of a second to import
        from scipy.sparse.csgraph import connected_components

        edges = torch.cat(self.edges).numpy() if self.edges else np.zeros((0, 2), np.int32)
        ones = np.ones(len(edges), np.int8)
        graph = coo_matrix((ones, (edges[:, 0], edges[:, 1])), shape=(self.count, self.count))
        return torch.from_numpy(connected_components(graph, directed=False)[1].astype(np.int64))

    def reasons(self, components: Tensor) -> dict[int, str]:
        """Why a component is frozen, by its number; the first reason counts."""
        found: dict[int, str] = {}
        for ids, reason in self.frozen:
            for component in torch.unique(components[ids.long()]).tolist():
                found.setdefault(component, reason)
        return found
