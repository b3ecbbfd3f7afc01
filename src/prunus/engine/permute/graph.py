"""A model by names: what rules ask, and how their answers become slots and folds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from prunus.core.layers import Layer, all_layers
from prunus.core.wrappers import clean_name, is_sharded, unwrap
from prunus.engine.permute.folds import Fold, FoldError, Slot


def straight(groups: int, copies: int, width: int, offset: int = 0) -> Tensor:
    """(groups, copies, width) consecutive positions from ``offset`` on."""
    return torch.arange(groups * copies * width).view(groups, copies, width) + offset


def join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def memory(tensor: Tensor) -> int:
    """What tied tensors have in common; the object itself where there is no memory."""
    if is_sharded(tensor) or tensor.device.type == "meta":
        return id(tensor)
    return tensor.data_ptr() or id(tensor)


def as_layer(module: nn.Module) -> Layer | None:
    """The module as a layer with a weight of its own, or None."""
    layer = next(all_layers(module), None)
    own = layer is not None and layer.module is module and layer.parameter_name == "weight"
    return layer if own else None


class Network:
    """The modules of a model by clean name, and which of its parameters share memory."""

    def __init__(self, model: nn.Module) -> None:
        self.model = unwrap(model)
        named = [(clean_name(name), module) for name, module in self.model.named_modules()]
        self.modules = dict(named)
        self.names = {module: name for name, module in named}
        self.owners: dict[int, list[str]] = {}
        for name, module in named:
            for attribute, tensor in module._parameters.items():
                if tensor is not None and not nn.parameter.is_lazy(tensor):
                    self.owners.setdefault(memory(tensor), []).append(join(name, attribute))

    def parent_of(self, name: str, relative: str) -> str | None:
        """The name of the module in which `name` is called `relative`; None if in none."""
        if name == relative:
            return ""
        return name.removesuffix("." + relative) if name.endswith("." + relative) else None

    def has(self, parent: str, relative: str) -> bool:
        """Is there such a module, or attention's own weight?"""
        if relative == "in_proj_weight":
            return self.modules[parent]._parameters.get(relative) is not None
        return join(parent, relative) in self.modules

    def registered_between(self, parent: str, first: Sequence[str], last: str) -> dict[str, str]:
        """Children of `parent` after all of `first` and before `last`: short name to name."""
        children = list(self.modules[parent]._modules)
        if not {*first, last} <= set(children):
            return {}
        begin = max(map(children.index, first)) + 1
        inner = children[begin : children.index(last)]
        names = {child: join(parent, child) for child in inner}
        return {child: name for child, name in names.items() if name in self.modules}

    def slot(
        self, module: nn.Module, attribute: str, dim: int, positions: Tensor, size: int
    ) -> Slot:
        """Raises FoldError if that is no stored tensor with ``size`` channels on this rank."""
        name, tensor = join(self.names[module], attribute), getattr(module, attribute)
        if not isinstance(tensor, nn.Parameter) and attribute not in module._buffers:
            raise FoldError(
                f"{name} is computed (parametrized?), so nothing stored can be permuted"
            )
        if is_sharded(tensor):
            raise FoldError(f"{name} is a DTensor; permute before the model is sharded")
        if tensor.dim() == 0 or tensor.shape[dim] != size:
            raise FoldError(f"{name} has shape {tuple(tensor.shape)} where {size} channels must be")
        return Slot(name, module, attribute, dim % tensor.dim(), positions)

    def reads(self, layer: Layer, positions: Tensor) -> Slot:
        """The input channels of a layer; ``positions`` covers all of them."""
        if getattr(layer.module, "groups", 1) != 1:
            raise FoldError(f"{layer.name} is a grouped convolution")
        return self.slot(layer.module, "weight", 1 - layer.rows_dim, positions, positions.numel())

    def layer(self, name: str) -> Layer:
        """The named module as a layer; raises FoldError if it is none, or grouped."""
        layer = as_layer(self.modules[name])
        if layer is None:
            kind = type(self.modules[name]).__name__
            raise FoldError(f"its input comes from {name} ({kind}), which no rule knows")
        if getattr(layer.module, "groups", 1) != 1:
            raise FoldError(f"its input is written by {name}, a grouped convolution")
        return layer

    def rows(self, name: str) -> int:
        """Outputs of the named layer. Raises FoldError."""
        layer = self.layer(name)
        return layer.shape[layer.rows_dim]

    def writes(self, name: str, positions: Tensor, size: int) -> list[Slot]:
        """The ``size`` output channels and the bias of the named layer."""
        module, layer = self.modules[name], self.layer(name)
        slots = [self.slot(module, "weight", layer.rows_dim, positions, size)]
        if getattr(module, "bias", None) is not None:
            slots.append(self.slot(module, "bias", 0, positions, size))
        return slots

    def scope(self, names: Iterable[str]) -> nn.Module:
        """The smallest module with a forward that holds the named modules."""
        paths = [name.split(".") if name else [] for name in names]
        common = []
        for parts in zip(*paths, strict=False):
            if len(set(parts)) > 1:
                break
            common.append(parts[0])
        while isinstance(self.modules[".".join(common)], nn.ModuleList | nn.ModuleDict):
            common.pop()
        module: nn.Module = self.modules[".".join(common)]
        return module

    def fold(
        self,
        name: str,
        kind: str,
        readers: tuple[Layer, ...],
        positions: Tensor,
        slots: Sequence[Slot],
    ) -> Fold:
        """Tied tensors once. Raises FoldError if one is tied to something outside the fold."""
        once = untied(slots)
        names = tuple(dict.fromkeys(slot.name for slot in slots))
        for slot in once:
            others = [n for n in self.owners.get(memory(slot.tensor), ()) if n not in names]
            if others:
                raise FoldError(f"{slot.name} is tied to {', '.join(others)}")
        scope = self.scope(n.rpartition(".")[0] for n in names)
        return Fold(name, kind, readers, positions, tuple(once), scope, names)


def untied(slots: Sequence[Slot]) -> list[Slot]:
    """Each tensor once. Raises FoldError if it is tied to one that is permuted differently."""
    once: dict[tuple[int, int], Slot] = {}
    stored: dict[int, Slot] = {}
    for slot in slots:
        key = memory(slot.tensor)
        view = stored.setdefault(key, slot)
        first = once.setdefault((key, slot.dim), slot)
        alike = view.tensor.shape == slot.tensor.shape
        alike = alike and view.tensor.stride() == slot.tensor.stride()
        if not alike or not torch.equal(first.positions, slot.positions):
            raise FoldError(f"{slot.name} is tied to {view.name}, which is used in another way")
    return list(once.values())
