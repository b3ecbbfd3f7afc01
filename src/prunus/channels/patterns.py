"""Channel masks for training: what a recipe's pattern multiplies into the weights after a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from prunus.channels.groups import Channels
from prunus.channels.surgery import gone_mask, masks


def unit_masks(
    model: nn.Module, found: Channels, gone: Mapping[str, Iterable[int]]
) -> dict[str, Tensor]:
    """Parameter or buffer -> keep-mask, broadcastable to it, for units that are to be zero.

    ``gone`` maps groups to numbers of units. Everything of a unit has its part: what writes the
    channel, its bias, its norm's scale and shift, a BatchNorm's running mean, and what reads it.
    Only a running variance keeps its value. With these zero, ``shrink(model, x, criterion=None)``
    removes the units and changes nothing.

    >>> import torch
    >>> from prunus.channels import channels
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> found = channels(net, torch.zeros(1, 2))
    >>> {n: m.flatten().int().tolist() for n, m in unit_masks(net, found, {"0": [1]}).items()}
    {'0.weight': [1, 0, 1], '0.bias': [1, 0, 1], '2.weight': [1, 0, 1]}
    """
    return masks(found, gone_mask(found, gone), model)
