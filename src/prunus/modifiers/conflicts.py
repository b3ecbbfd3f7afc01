"""Two runs that want the same weights at the same time."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from prunus.modifiers.base import Run


def in_both(some: Iterable[Run], others: Iterable[Run]) -> str:
    """The first layer, or third of one, that runs of both sides mask; empty if there is none."""
    masked = [layer for run in others for layer in run.masked_layers]
    for layer in (layer for run in some for layer in run.masked_layers):
        for other in masked:
            parts = {layer.part_key, other.part_key}
            if layer.parameter_name == other.parameter_name and (None in parts or len(parts) == 1):
                return layer.name
    return ""


def check_conflicts(runs: Sequence[Run]) -> None:
    """Raises ValueError where two runs would mask a layer at the same time and one undo the other.

    Runs that prune may go on in a layer that others mask or accelerate: what is left is the same
    for both. Not where pruned weights train on, because the next masks would bring them back.
    """
    for a, b in itertools.combinations(runs, 2):
        apart = a.span[1] <= b.span[0] or b.span[1] <= a.span[0]
        alone = a.trains or b.trains or not (a.prunes or b.prunes)
        if alone and not apart and (name := in_both([a], [b])):
            raise ValueError(
                f"two entries mask {name} at the same time, and one of them trains it to N:M, "
                "accelerates it or has masks of its own; let one window begin where the other "
                "ends, or exclude the layer from one"
            )
