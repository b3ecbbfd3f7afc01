"""Optimizer state for what stays."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from prunus.channels.result import Shrunk
from prunus.channels.surgery import select


def follow(optimizer: torch.optim.Optimizer, model: nn.Module, result: Shrunk) -> None:
    """Cut momenta and the like as the parameters were cut, so that training goes on.

    The parameters are the same objects as before, so ``param_groups`` need nothing. Call it once
    for each `shrink`, with what that returned.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    >>> optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    >>> net(torch.ones(1, 4)).sum().backward(); optimizer.step(); optimizer.zero_grad()
    >>> from prunus.channels import shrink
    >>> follow(optimizer, net, shrink(net, torch.ones(1, 4), target={"params": 0.6}, measure=False))
    >>> optimizer.state[net[0].weight]["momentum_buffer"].shape
    torch.Size([4, 4])
    """
    named = dict(model.named_parameters())
    for name, axes in result.kept.items():
        p = named.get(name)
        if p is None or p not in optimizer.state:
            continue
        state = optimizer.state[p]
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim() == p.dim() and _fits(value, axes):
                state[key] = select(value, axes)


def _fits(value: Tensor, axes: Mapping[int, Tensor]) -> bool:
    return all(value.shape[dim] == len(keep) for dim, keep in axes.items())
