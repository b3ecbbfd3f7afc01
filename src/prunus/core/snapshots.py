"""What tensors hold at a moment, kept for later: models may write to them meanwhile."""

from __future__ import annotations

import weakref
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

T = TypeVar("T")


class Snapshots:
    """Copies of tensors, nested or not; one for each tensor until it is written to.

    So what many modules are given, as a mask, is copied once.

    >>> keep, x = Snapshots(), torch.zeros(2)
    >>> before = keep((x, [x]))
    >>> _ = x.add_(1)
    >>> before, keep(x), before[0] is before[1][0]
    ((tensor([0., 0.]), [tensor([0., 0.])]), tensor([1., 1.]), True)
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int, Tensor]] = {}

    def __call__(self, value: T) -> T:
        """The same, with copies in the place of tensors."""
        result: T = tree_map_only(Tensor, self._copy, value)
        return result

    @torch.no_grad()
    def _copy(self, t: Tensor) -> Tensor:
        version = -1 if t.is_inference() else t._version  # those of inference mode have none
        ref, seen, copy = self._known.get(id(t), (None, -1, t))
        if ref is None or ref() is not t or seen != version or version < 0:
            copy = t.detach().clone()
            self._known[id(t)] = weakref.ref(t), version, copy
        return copy
