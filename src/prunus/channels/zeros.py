"""Units that are zero already, as training with a channel pattern leaves them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prunus.channels.groups import Channels, Group


def zero_units(model: nn.Module, found: Channels) -> dict[str, list[int]]:
    """Group -> units of which nothing reaches the output.

    That is where everything that writes or shifts the channel is zero, or everything that reads it.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    results = {}
    for group in found.groups:
        units = _zero(group, tensors).nonzero().flatten().tolist()
        if len(units) == group.size:
            units = units[group.min_keep :]
        if units:
            results[group.name] = units
    return results


def _zero(group: Group, tensors: dict[str, Tensor]) -> Tensor:
    """(units,) bool."""
    written = torch.ones(group.size, dtype=torch.bool)
    read = torch.ones(group.size, dtype=torch.bool)
    readers = writers = 0
    for slot in group.slots:
        if slot.parameter.endswith("running_var"):
            continue
        t = tensors[slot.parameter].detach()
        index = slot.index.to(t.device)
        zero = (t.movedim(slot.dim, 0)[index.flatten()].reshape(len(index), -1) == 0).all(1).cpu()
        if slot.role == "in":
            read, readers = read & zero, readers + 1
        else:
            written, writers = written & zero, writers + 1
    return (written if writers else ~read.new_ones(group.size)) | (read & torch.tensor(readers > 0))
