"""What is known of a layer goes the way of its columns: statistics, and zeros."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterable, Mapping, MutableMapping
from typing import TypeVar

import torch
from torch import Tensor

from prunus.core.layers import Layer
from prunus.engine.permute.folds import Fold
from prunus.stats import Statistic

Key = TypeVar("Key", bound=Hashable)


def columns_of(fold: Fold, perms: Tensor, layer: Layer) -> Tensor:
    """(columns,) the permutation of a reader's matrix, in which channels are innermost."""
    channels = fold.columns(perms)
    kernel = layer.matrix_shape()[1] // len(channels)
    starts = torch.arange(kernel).unsqueeze(1) * len(channels)
    return (starts + channels).flatten()


def follow(stats: MutableMapping[Key, Statistic], columns: Mapping[Key, Tensor]) -> bool:
    """Permute the statistics of these keys; false if one of them cannot, and then none is.

    Keys beside them may share a statistic, which stays as it is for those.
    """
    if any(not stats[key].can_permute for key in columns):
        return False
    moved: dict[int, Statistic] = {}
    for key, order in columns.items():
        stat = stats[key]
        if id(stat) not in moved:
            shared = any(stats[other] is stat for other in stats if other not in columns)
            moved[id(stat)] = copy.deepcopy(stat) if shared else stat
            moved[id(stat)].permute(order)
        stats[key] = moved[id(stat)]
    return True


def share_of_zeros(layers: Iterable[Layer]) -> float:
    """The share of these layers' weights that is zero; weights on the meta device do not count."""
    weights = [layer.local for layer in layers if not layer.local.is_meta]
    zeros = sum(w.numel() - int(w.count_nonzero()) for w in weights)
    return zeros / max(1, sum(w.numel() for w in weights))
