"""Masks as tensors: put on, packed into bits, and found on this rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def zero_pruned(weights: list[Tensor], masks: list[Tensor]) -> None:
    """Zero in place what the masks do not keep, for all weights of a modifier in one fused call.

    NaN and infinities too: bits are multiplied by 0 and 1 as integers, so a mask selects. (Nor is
    casting from booleans vectorized on CPUs.)
    """
    if weights:
        bits = [w.view(_INTEGERS[w.element_size()]) for w in weights]
        torch._foreach_mul_(bits, [mask.view(torch.uint8) for mask in masks])


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor (sharing its memory); any other tensor itself."""
    to_local = getattr(tensor, "to_local", None)
    result: Tensor = tensor if to_local is None else to_local()
    return result


def countable(t: Tensor) -> Tensor:
    """The same zeros in a dtype in which torch can count them: not float8, nor a quantized one."""
    if t.is_quantized:
        return t.dequantize()
    if t.is_floating_point() and t.element_size() == 1:
        return t.view(torch.uint8) & 0x7F  # without the sign
    return t


def count_zeros(t: Tensor) -> int:
    """How many entries are zero.

    >>> count_zeros(torch.tensor([0.0, 1.0, -0.0]))
    2
    """
    return t.numel() - int(countable(t).count_nonzero())


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


def check_packed(name: str, mask: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of what `packed` made. Raises ValueError, with the name, if it is nothing such."""
    shape, bits = mask.get("shape"), mask.get("bits")
    if not isinstance(shape, (list, tuple)) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{name}: shape={shape!r} is no list of sizes")
    if not isinstance(bits, Tensor) or bits.dtype != torch.uint8 or bits.dim() != 1:
        raise ValueError(f"{name}: bits are no uint8 tensor of one axis")
    if len(bits) != (size := -(-prod(shape) // 8)):
        raise ValueError(f"{name}: {len(bits)} bytes of bits, where shape {shape} takes {size}")
    return tuple(shape)
