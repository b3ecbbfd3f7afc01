"""The one registry of masks: which weights are pruned, and who keeps them so."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from prunus.core.fused_qkv import qkv_parts
from prunus.core.layers import Layer
from prunus.core.masks import local, zero_pruned
from prunus.core.names import did_you_mean

_WHOLE = None  # the key of an owner of all of a weight; else the number of a piece of it


class Masks(Mapping[str, Tensor]):
    """Keep-masks by clean parameter name, each in the shape and memory layout of its weight.

    Tied weights have one entry. Every mask, or third of one where q, k and v are masked apart, has
    at most one owner: whoever set it last, and puts it on again after each step.
    """

    def __init__(self) -> None:
        self._weights: dict[str, Tensor] = {}
        self._masks: dict[str, Tensor] = {}
        self._owners: dict[str, dict[int | None, object]] = {}

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

    def of(self, layer: Layer) -> Tensor | None:
        """The layer's keep-mask (a view); None if its weight has none."""
        mask = self._masks.get(layer.parameter_name)
        return None if mask is None else layer.part(mask)

    @torch.no_grad()
    def put(self, layer: Layer, mask: Tensor, owner: object = None) -> None:
        """Set the mask of a layer, of the shape of its local part, and who keeps it on.

        That of a third leaves the others as they are, and with those who own them.
        """
        name, whole = layer.parameter_name, mask
        if layer.piece is not None:
            all_kept = torch.ones_like(local(layer.weight), dtype=torch.bool)
            whole = self._masks.get(name, all_kept)
            layer.part(whole).copy_(mask)
        self.load(name, layer.weight, whole)
        owners = self._owners.get(name, {})
        if layer.piece is None or layer.part_key is None:
            owners = {}
        elif _WHOLE in owners:
            owners = dict.fromkeys(range(layer.piece.count), owners[_WHOLE])
        self._owners[name] = {**owners, layer.part_key: owner}

    def load(self, name: str, weight: Tensor, mask: Tensor) -> None:
        """Set a whole mask by the name of its parameter; owners stay."""
        shard = local(weight)
        if mask.stride() != shard.stride():
            # the weight's memory format, so that applying it walks both in the same order
            mask = torch.empty_like(shard, dtype=torch.bool).copy_(mask)
        self._masks[name] = mask
        self._weights[name] = weight

    def lift(self, layer: Layer) -> None:
        """Nothing in the layer is masked any more, and nobody owns it."""
        self.put(layer, torch.ones_like(layer.local, dtype=torch.bool))

    def owned(self, owner: object, layers: Iterable[Layer]) -> list[Layer]:
        """The layers, or the thirds of them, that are the owner's."""
        found = []
        for layer in layers:
            owners = self._owners.get(layer.parameter_name)
            if owners:
                candidates = [layer] if layer.part_key in owners else qkv_parts(layer)
                found += [x for x in candidates if owners.get(x.part_key) is owner]
        return found

    def own(self, owner: object, layers: Iterable[Layer], names: Iterable[str]) -> None:
        """Give back what was owned when it was saved, by the names of layers and thirds."""
        names = set(names)
        for layer in layers:
            for each in (layer, *qkv_parts(layer)):
                if each.name in names:
                    self._owners.setdefault(each.parameter_name, {})[each.part_key] = owner

    def is_owned(self, layer: Layer) -> bool:
        """Whether all of the layer is somebody's."""
        owners = self._owners.get(layer.parameter_name, {})
        held = {part for part, owner in owners.items() if owner is not None}
        parts = {x.part_key for x in qkv_parts(layer)} or {layer.part_key}
        return _WHOLE in held or parts <= held

    def owned_parts(self, layer: Layer) -> list[str]:
        """The names of the thirds of the layer that are somebody's."""
        owners = self._owners.get(layer.parameter_name, {})
        return [x.name for x in qkv_parts(layer) if owners.get(x.part_key) is not None]

    def disown_all(self) -> None:
        """Nobody keeps any mask on until it is given back."""
        self._owners.clear()

    def keep_only(self, names: Iterable[str]) -> None:
        """Forget all other masks."""
        for name in self._masks.keys() - set(names):
            del self._masks[name], self._weights[name]

    def apply(self, owner: object, layers: Iterable[Layer]) -> None:
        """Zero what is pruned in the layers that are the owner's, in one fused call."""
        owned = self.owned(owner, layers)
        masks = [layer.part(self._masks[layer.parameter_name]) for layer in owned]
        zero_pruned([layer.local for layer in owned], masks)

    def off(self, spared: Container[str] = ()) -> dict[str, int]:
        """How many weights are masked and yet not zero, by parameter name, but for the spared."""
        counts = {}
        for name, mask in self._masks.items():
            if name not in spared:
                off = int((local(self._weights[name].detach()) != 0).logical_and_(~mask).sum())
                if off:
                    counts[name] = off
        return counts

    def pruned(self) -> dict[str, int]:
        """How many weights are masked and really zero, by parameter name (this rank's)."""
        off = self.off()
        return {
            name: mask.numel() - int(mask.count_nonzero()) - off.get(name, 0)
            for name, mask in self._masks.items()
        }

    @torch.no_grad()
    def put_on(self, names: Iterable[str]) -> None:
        """Zero what is masked in these parameters."""
        zero_pruned(*self.parts(names))

    def rebind(self, layer: Layer) -> None:
        """The layer's parameter has been replaced; its mask is that of the new one."""
        if layer.parameter_name in self._masks:
            self._weights[layer.parameter_name] = layer.weight

    def parts(self, names: Iterable[str]) -> tuple[list[Tensor], list[Tensor]]:
        """Local weights and masks of those names that have one."""
        names = [name for name in names if name in self._masks]
        return [local(self._weights[n].detach()) for n in names], [self._masks[n] for n in names]

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
                zero_pruned([part.detach()], [mask.to(part.device)])
