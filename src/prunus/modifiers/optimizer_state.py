"""What optimizers remember of a weight, themselves and those inside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from prunus.core.layers import Layer
from prunus.core.masks import local, zero_pruned


def wrapped_optimizers(optimizer: torch.optim.Optimizer) -> Iterator[torch.optim.Optimizer]:
    """The optimizer, and those it steps for itself, as Lookahead does."""
    yield optimizer
    for value in list(vars(optimizer).values()):
        for each in value if isinstance(value, list | tuple) else (value,):
            if isinstance(each, torch.optim.Optimizer):
                yield from wrapped_optimizers(each)


def states_of(optimizer: torch.optim.Optimizer, layer: Layer) -> Iterator[dict[str, Any]]:
    """What is remembered of the layer's weight, wherever that is."""
    for each in wrapped_optimizers(optimizer):
        if state := each.state.get(layer.weight):
            yield state


def keeps_copies(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer swaps weights for copies of its own, as schedule-free ones do.

    Their ``eval()`` makes the weights from the copy ``z`` of the state, and would bring pruned
    ones back. (A. Defazio et al., "The Road Less Scheduled", 2024,
    https://arxiv.org/abs/2405.15682.)
    """
    return any(
        callable(getattr(each, "eval", None)) and callable(getattr(each, "train", None))
        for each in wrapped_optimizers(optimizer)
    )


def zero_momentum(optimizer: torch.optim.Optimizer, layer: Layer, mask: Tensor) -> None:
    """Zero every state tensor of the weight's shape where the layer is pruned."""
    for state in states_of(optimizer, layer):
        for value in state.values():
            if isinstance(value, Tensor) and value.shape == layer.weight.shape:
                part = layer.part(local(value))
                zero_pruned([part], [mask.to(part.device)])
