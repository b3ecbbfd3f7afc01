"""Two runs that want the same weights at the same time."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from prunus.core.layers import Layer
from prunus.modifiers.base import Run
from prunus.modifiers.nm.run import TrainingRun
from prunus.modifiers.pruning_run import PruningRun
from prunus.modifiers.semi_sparse import AccelerateRun


def in_both(some: Iterable[Run], others: Iterable[Run]) -> str:
    """The first layer, or third of one, that runs of both sides mask; empty if there is none."""
    theirs = [layer for run in others for layer in _layers(run)]
    for layer in (layer for run in some for layer in _layers(run)):
        for other in theirs:
            same = layer.parameter_name == other.parameter_name
            if same and (
                None in (layer.qkv_part, other.qkv_part) or layer.qkv_part == other.qkv_part
            ):
                return layer.name
    return ""


def _layers(run: Run) -> Sequence[Layer]:
    layers: Sequence[Layer] = getattr(run, "layers", ())
    return layers


def check_turns(runs: Sequence[Run]) -> None:
    """Raises ValueError where two entries would mask a layer at the same time and one trains it so.

    Pruning may go on in a layer while it is accelerated: the weights left are the same for both.
    """
    masking = [run for run in runs if isinstance(run, PruningRun | TrainingRun | AccelerateRun)]
    for a, b in itertools.combinations(masking, 2):
        apart = a.span[1] <= b.span[0] or b.span[1] <= a.span[0]
        prunes = isinstance(a, PruningRun) or isinstance(b, PruningRun)
        trains = not prunes or isinstance(a, TrainingRun) or isinstance(b, TrainingRun)
        if trains and not apart and (name := in_both([a], [b])):
            raise ValueError(
                f"two entries mask {name} at the same time, and one of them trains it to N:M or "
                "accelerates it; let one window begin where the other ends, or exclude the layer "
                "from one"
            )
