"""How masks act on live weights between optimizer steps.

`Masks` is the one registry of a session: clean parameter name -> weight and keep-mask, tied
weights once. A `Masking` says what a mask does to its weight at the step boundary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from prunus.core.names import Registry, did_you_mean


@runtime_checkable
class Masking(Protocol):
    """What happens to masked weights around a step, for all weights of a modifier at once.

    Lists rather than single tensors, so that one fused call serves a whole model.
    """

    name: ClassVar[str]

    def apply(self, weights: list[Tensor], masks: list[Tensor], beta: float = 0.0) -> None:
        """After a step, in place: what the next forward pass sees."""
        ...


@dataclass(frozen=True)
class Hard:
    """Pruned weights are zero: ``w * mask`` after each step."""

    name: ClassVar[str] = "hard"

    def apply(self, weights: list[Tensor], masks: list[Tensor], beta: float = 0.0) -> None:
        if weights:
            # the same bytes as integers, because casting from booleans is not vectorized on CPUs
            torch._foreach_mul_(weights, [mask.view(torch.uint8) for mask in masks])


Narrow = Callable[[Tensor], Tensor]
MASKINGS: Registry[Masking] = Registry("masking")
MASKINGS.add("hard", Hard)


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


class Masks(Mapping[str, Tensor]):
    """Keep-masks by clean parameter name, each in the shape and memory layout of its weight."""

    def __init__(self) -> None:
        self._weights: dict[str, Tensor] = {}
        self._masks: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._masks:
            raise KeyError(f"no mask for {name!r}{did_you_mean(name, self._masks)}")
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def weight(self, name: str) -> Tensor:
        """The parameter behind the mask (a DTensor where the model is sharded)."""
        return self._weights[name]

    @torch.no_grad()
    def put(
        self,
        name: str,
        weight: Tensor,
        mask: Tensor,
        part: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Set the mask of a weight; ``mask`` has the shape of the weight's local part.

        With `part`, a function that narrows a tensor of that shape, it is the mask of what that
        shows, and the rest keeps its own.
        """
        shard = local(weight)
        if part is not None:
            whole = self._masks.get(name, torch.ones_like(shard, dtype=torch.bool))
            part(whole).copy_(mask)
            mask = whole
        if mask.stride() != shard.stride():
            # the weight's memory format, so that applying it walks both in the same order
            mask = torch.empty_like(shard, dtype=torch.bool).copy_(mask)
        self._masks[name] = mask
        self._weights[name] = weight

    def keep_only(self, names: Iterable[str]) -> None:
        """Forget all other masks."""
        for name in self._masks.keys() - set(names):
            del self._masks[name], self._weights[name]

    def parts(self, names: Iterable[str]) -> tuple[list[Tensor], list[Tensor]]:
        """Local weights and masks of those names that have one."""
        names = [name for name in names if name in self._masks]
        return [local(self._weights[n]) for n in names], [self._masks[n] for n in names]

    def project(self, parameters: Mapping[str, Tensor]) -> None:
        """Zero what is pruned here in another model's parameters, by clean name.

        Raises ValueError if a name is missing there or has another shape; nothing is then changed.
        """
        for name, mask in self._masks.items():
            if name not in parameters:
                raise ValueError(f"the other model has no {name!r}{did_you_mean(name, parameters)}")
            if local(parameters[name]).shape != mask.shape:
                shape = tuple(local(parameters[name]).shape)
                raise ValueError(f"{name!r} is {shape} there and {tuple(mask.shape)} here")
        with torch.no_grad():
            for name, mask in self._masks.items():
                part = local(parameters[name])
                part.mul_(mask.to(part.device))


def zero_momentum(
    optimizer: torch.optim.Optimizer,
    weight: Tensor,
    mask: Tensor,
    part: Narrow = lambda t: t,
) -> None:
    """Zero every state tensor of the weight's shape where it is pruned, in the part of the mask."""
    state: dict[str, Any] = optimizer.state.get(weight, {})
    for value in state.values():
        if isinstance(value, Tensor) and value.shape == weight.shape:
            state_part = part(local(value))
            state_part.mul_(mask.to(state_part.device))
