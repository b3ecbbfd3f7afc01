"""Parameters and multiply-accumulates of what is left when units are gone, without running it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunus.channels.trace import Trace


@dataclass(frozen=True)
class Product:
    """``constant`` times the number of components kept in each factor."""

    constant: int
    factors: Sequence[Tensor]
    module: str

    def total(self, gone: Tensor | None) -> int:
        sizes = [len(f) if gone is None else len(f) - int(gone[f].sum()) for f in self.factors]
        return self.constant * math.prod(sizes)


@dataclass(frozen=True)
class CostModel:
    """Costs as products over axes; ``gone`` is (components,) bool, or None for the whole model."""

    products: dict[str, Sequence[Product]]
    """``params`` and ``macs``; the latter of one forward pass on the example inputs"""
    components: int

    @classmethod
    def of(cls, trace: Trace, model: nn.Module, components: Tensor) -> CostModel:
        macs = [
            Product(c.constant, [components[f.long()] for f in c.factors], c.module)
            for c in trace.costs
        ]
        params = []
        for name, p in model.named_parameters():
            axes = trace.parameters[name]
            fixed = math.prod(s for d, s in enumerate(p.shape) if d not in {a for a, _ in axes})
            params.append(Product(fixed, [components[ids.long()] for _, ids in axes], name))
        return cls({"params": params, "macs": macs}, int(components.max()) + 1)

    def total(self, kind: str, gone: Tensor | None = None) -> int:
        """``params`` or ``macs`` of what is left.

        >>> from prunus.channels import channels
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> channels(net, torch.zeros(1, 4)).costs.total("macs")
        48
        """
        return sum(product.total(gone) for product in self.products[kind])

    def nothing_gone(self) -> Tensor:
        return torch.zeros(self.components, dtype=torch.bool)
