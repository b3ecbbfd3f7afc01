"""How a layer is sparse in training: the settings of one `swap_linear_with_semi_sparse_linear`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SemiSparse:
    """Weights or activations that are 2:4 both ways, by 4 x 4 tile, while a layer computes."""

    kind: Literal["weight", "activation"] = "weight"
    """what is sparse: the weight, or the layer's input"""
    rule: Literal["exact", "greedy"] = "exact"
    """which mask of a tile: that of most energy, or the largest magnitudes one by one"""
    gradient: Literal["ste", "sr_ste", "masked"] = "ste"
    """the gradient of what the mask hides: passed on as it is (ste), with decay of the hidden
    weights added (sr_ste), or zero (masked)"""
    decay: float = 2e-4
    """for sr_ste: this times the hidden weight is added to its gradient"""
    refresh: int = 1
    """updates of the weight after which its mask is chosen anew; 0: never by itself"""

    def __post_init__(self) -> None:
        for name, value, known in (
            ("kind", self.kind, ("weight", "activation")),
            ("rule", self.rule, ("exact", "greedy")),
            ("gradient", self.gradient, ("ste", "sr_ste", "masked")),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} is not known; one of: {', '.join(known)}")
        if not self.decay >= 0:
            raise ValueError(f"decay={self.decay} lets hidden weights grow; give 0 or more")
        if self.refresh < 0:
            raise ValueError(f"refresh={self.refresh}; give 1 or more updates, or 0 for never")
        if self.kind == "activation" and self.gradient == "sr_ste":
            raise ValueError("gradient 'sr_ste' decays weights, activations are none; use 'ste'")
        if self.kind == "activation" and self.refresh != 1:
            raise ValueError("activations are new in each forward pass; drop 'refresh'")
