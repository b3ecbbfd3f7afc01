"""What runs record."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from prunus.core.layers import Layer
from prunus.core.sharding import ranks_of
from prunus.engine.method import LayerResult, collapse_message, unreached_messages

log = logging.getLogger("prunus")


def counted(layer: Layer, pattern: str, entries: Tensor) -> LayerResult:
    """The layer's row, with the zeros of its weight or mask counted over all ranks that hold it."""
    counts = torch.tensor([entries.numel(), entries.numel() - int(entries.count_nonzero())])
    size, zeros = ranks_of(layer.weight).all_reduce(counts).tolist()
    itemsize = layer.weight.element_size()
    return LayerResult(layer.name, layer.kind, layer.shape, pattern, size, zeros, itemsize, None)


def pruning_event(
    pruner: str,
    pattern: str,
    rows: Sequence[LayerResult],
    step: int,
    target: float | None,
    misfits: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """What records and reports know of layers at one step; ``pruner`` and ``pattern`` say why.

    ``misfits`` are layers that could not be pruned so, and the reasons.
    """
    zeros, size = sum(row.zeros for row in rows), sum(row.size for row in rows)
    collapsed = [row.name for row in rows if row.collapsed]
    if collapsed:
        log.warning("%s", collapse_message(collapsed))
    unreached = {row.name: row.unreached for row in rows if row.unreached}
    for message in unreached_messages(rows):
        log.warning("%s", message)
    return {
        "event": "prune",
        "step": step,
        "pruner": pruner,
        "pattern": pattern,
        "target": target,
        "sparsity": zeros / max(1, size),
        "layers": {row.name: row.sparsity for row in rows},
        "sizes": {row.name: row.size for row in rows},
        "saved": {row.name: row.saved for row in rows},
        **({"collapsed": collapsed} if collapsed else {}),
        **({"unreached": unreached} if unreached else {}),
        **({"misfits": dict(misfits)} if misfits else {}),
    }
