"""Layers about which the data told nothing: refused, pruned by magnitude, or left as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from prunus.calibration.gradient_checks import ZERO_GRADIENTS
from prunus.calibration.measurements import Measurements
from prunus.calibration.memory_plan import Rows
from prunus.core.layers import Layer
from prunus.core.names import few
from prunus.core.ranks import Ranks
from prunus.engine.allocation import layer_row
from prunus.engine.method import LayerUpdate, Method
from prunus.stats import Statistic


def refuse_unreached(method: Method, unreached: Mapping[Layer, str]) -> None:
    """Raises ValueError, on every rank, for layers without data that nothing was said about.

    Not for those that had inputs, and zeros for gradients: they are pruned by magnitude.
    """
    clauses = [clause for clause in unreached.values() if clause != ZERO_GRADIENTS]
    if clauses and method.unreached == "error":
        clause = clauses[0]
        names = [layer.name for layer, other in unreached.items() if other == clause]
        raise ValueError(
            f"{clause} {few(names, 5)}; nothing was pruned: exclude them, give data that does, or "
            "say what becomes of such layers, with unreached: magnitude or unreached: dense"
        )


def statistics(method: Method, measured: Measurements, i: int) -> dict[Rows, Statistic]:
    """Those of the i-th group. Raises ValueError as `refuse_unreached`."""
    found = measured[i]
    refuse_unreached(method, measured.unreached)
    return found


def left_dense(method: Method, measured: Measurements, layer: Layer) -> bool:
    """Whether the layer stays as it is, by what has been measured until now."""
    return method.unreached == "dense" and layer in measured.unreached


def solvable(method: Method, measured: Measurements) -> list[Rows]:
    """This rank's rows of all layers but those that stay as they are."""
    return [rows for rows in measured.shares if not left_dense(method, measured, rows.layer)]


def magnitudes(rows: Rows) -> Tensor:
    """(rows, cols) scores in place of those that there is no data for."""
    return rows.matrix().abs()


def with_unchanged(
    method: Method, measured: Measurements, changes: list[LayerUpdate], ranks: Ranks
) -> list[LayerUpdate]:
    """The changes, and between them the layers that stay as they are, which hide what is zero."""
    by_layer = {change.layer: change for change in changes}
    for rows in measured.shares:
        if left_dense(method, measured, rows.layer):
            by_layer[rows.layer] = _unchanged(rows, ranks)
    return [by_layer[rows.layer] for rows in measured.shares]


def _unchanged(rows: Rows, ranks: Ranks) -> LayerUpdate:
    w, part = rows.layer.local, rows.matrix()
    counts = torch.tensor([part.numel(), part.numel() - int(part.count_nonzero())])
    size, zeros = ranks.all_reduce(counts).tolist()
    row = replace(layer_row(rows, "dense", size, zeros), unreached="dense")
    return LayerUpdate(rows.layer, w.clone(), w != 0, row)
