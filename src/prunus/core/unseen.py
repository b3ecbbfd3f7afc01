"""Weights that are no layer: embeddings, and those of people's own modules.

They stay dense, so whoever tells a share of a model counts them too.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from prunus.core.layers import all_layers
from prunus.core.masks import local
from prunus.core.names import few
from prunus.core.shared_memory import storage_of
from prunus.core.wrappers import clean_name, reshard, unwrap


@dataclass(frozen=True)
class UnseenWeight:
    """A floating-point parameter of two or more axes that no `Layer` stands for."""

    name: str
    kind: str
    """the class of its module"""
    weight: Tensor

    @property
    def size(self) -> int:
        return local(self.weight).numel()


def unseen_weights(model: nn.Module) -> list[UnseenWeight]:
    """The largest first, tied ones once."""
    reshard(model)
    seen = {storage_of(layer.weight) for layer in all_layers(model)}
    found = []
    for prefix, module in unwrap(model).named_modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.dim() < 2 or not weight.is_floating_point() or storage_of(weight) in seen:
                continue
            seen.add(storage_of(weight))
            full = clean_name(f"{prefix}.{name}" if prefix else name)
            found.append(UnseenWeight(full, type(module).__name__, weight.detach()))
    return sorted(found, key=lambda item: -item.size)


def told(model: nn.Module, unseen: list[UnseenWeight] | None = None) -> str:
    """One line on the weights that are no layers (found here, or before); empty if none are."""
    unseen = unseen_weights(model) if unseen is None else unseen
    size = sum(item.size for item in unseen)
    whole = size + sum(layer.local.numel() for layer in all_layers(model))
    if not size:
        return ""
    some = few([f"{item.name} ({item.kind}, {item.size:,})" for item in unseen])
    return f"not seen, dense: {size / max(1, whole):.1%} of the model's weights: {some}"
