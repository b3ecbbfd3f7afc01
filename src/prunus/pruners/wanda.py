"""Wanda: magnitudes times the norms of the inputs.

M. Sun, Z. Liu, A. Bair, J. Z. Kolter, "A simple and effective pruning approach for large language
models", 2023, https://arxiv.org/abs/2306.11695, eq. 1.

Here a row loses an exact count, padding tokens are not counted, and convolutions are measured too.
The paper compares within each output: pattern ``row``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prunus.core.layers import working_precision
from prunus.core.patterns import Pattern
from prunus.core.ranks import Ranks
from prunus.pruners._layerwise import InputStatistic, Layerwise
from prunus.pruners.base import register_pruner


@register_pruner
@dataclass(frozen=True)
class Wanda(Layerwise):
    """Remove the weights whose product with their inputs is smallest: score ``|w_ij| ||X_j||``.

    The best choice for a row when its inputs are uncorrelated and survivors stay as they are.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> data = prunus.Calibration([torch.randn(16, 8)])
    >>> prunus.prune(model, prunus.Wanda(refit=True), sparsity=0.5, calibration=data).sparsity
    0.5
    """

    name: ClassVar[str] = "wanda"

    def scores(self, w: Tensor, stat: InputStatistic, pattern: Pattern, ranks: Ranks) -> Tensor:
        return working_precision(w).abs() * stat.norm.to(w.device)
