"""Routers of mixtures of experts: small layers that say which expert a token goes to."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from prunus.core.layers import Layer
from prunus.core.wrappers import unwrap

EXPERTS = re.compile(r"(?!shared)(\w+_)?experts(_\w+)?|\w+Experts")
"""what a list of experts is called, or its class"""
ROUTER = re.compile(r"\w*(router|gate|gating)\w*")
COUNT = re.compile(r"(n|num|\w+_num)_(\w+_)?experts")


def routers(model: nn.Module, layers: Sequence[Layer]) -> list[Layer]:
    """Layers beside experts that put out a number for each of them, or one for all.

    What is beside them is a part of one layer, or of several if it is called a router or gate.
    """
    found: set[Layer] = set()
    for module in unwrap(model).modules():
        parts = dict(module.named_children())
        experts = {name: part for name, part in parts.items() if _are_experts(name, part)}
        counts = {n for each in experts.values() for n in _counts(each)}
        for name in parts.keys() - experts.keys() if counts else ():
            inside = set(parts[name].modules())
            own = [layer for layer in layers if layer.module in inside]
            width = own[-1].matrix_shape()[0] if own else 0
            if width == 1 == len(own) or (width in counts and _routes(name, own)):
                found.add(own[-1])
    return [layer for layer in layers if layer in found]


def _routes(name: str, layers: Sequence[Layer]) -> bool:
    return len(layers) == 1 or ROUTER.fullmatch(name) is not None


def _are_experts(name: str, module: nn.Module) -> bool:
    return any(EXPERTS.fullmatch(word) for word in (name, type(module).__name__))


def _counts(experts: nn.Module) -> set[int]:
    """How many experts there are, by every sign of it."""
    listed = isinstance(experts, nn.ModuleList | nn.ModuleDict | nn.Sequential)
    found = {len(list(experts.children()))} if listed else set()
    found |= {p.shape[0] for p in experts.parameters() if p.dim() == 3}
    for module in experts.modules():
        found |= {
            value
            for name, value in vars(module).items()
            if COUNT.fullmatch(name) and isinstance(value, int)
        }
    return {n for n in found if n > 1}
