"""Masks as tensors: put on, packed into bits, and found on this rank."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def zero_pruned(weights: list[Tensor], masks: list[Tensor]) -> None:
    """``w * mask`` in place, for all weights of a modifier in one fused call."""
    if weights:
        # the same bytes as integers, because casting from booleans is not vectorized on CPUs
        torch._foreach_mul_(weights, [mask.view(torch.uint8) for mask in masks])


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor (sharing its memory); any other tensor itself."""
    to_local = getattr(tensor, "to_local", None)
    result: Tensor = tensor if to_local is None else to_local()
    return result


def pack(mask: Tensor) -> Tensor:
    """Booleans to bits, eight to a uint8, the first in the highest bit."""
    flat = mask.reshape(-1)
    padded = torch.nn.functional.pad(flat.to(torch.uint8), (0, -flat.numel() % 8)).view(-1, 8)
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=mask.device)
    return (padded << shifts).sum(1, dtype=torch.uint8)


def unpack(bits: Tensor, shape: Iterable[int]) -> Tensor:
    """The inverse of `pack`."""
    size = torch.Size(shape)
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device)
    return ((bits.unsqueeze(1) >> shifts) & 1).bool().reshape(-1)[: size.numel()].reshape(size)


def packed(mask: Tensor) -> dict[str, object]:
    """A mask as states hold it: its shape, and its bits on the CPU."""
    return {"shape": list(mask.shape), "bits": pack(mask).cpu()}
