"""A method that the package does not know, as a user would write one."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

import prunus
from prunus.core.layers import Layer
from prunus.core.patterns import Pattern
from prunus.pruners import Ranks, ScorePruner
from prunus.stats import InputNorm

from tests.helpers.cases import Case


@prunus.register_pruner
@dataclass(frozen=True)
class Toy(ScorePruner):
    """Score ``|w|^power * norm(x)``; what stays is scaled by ``scale``."""

    name: ClassVar[str] = "toy"

    power: float = 1.0
    """exponent of the magnitude"""
    scale: float = 1.0
    """factor of the weights that stay"""

    def statistic(self, layer: Layer) -> InputNorm:
        return InputNorm(layer.matrix_shape()[1])

    def scores(self, w: Tensor, stat: InputNorm, pattern: Pattern, ranks: Ranks) -> Tensor:
        return w.abs() ** self.power * stat.norm.to(w)

    def rebuild(self, w: Tensor, stat: InputNorm, mask: Tensor) -> Tensor:
        return w * self.scale


CASE = Case(Toy(), True, ("unstructured", "row", "2:4", "1:4", "4x1", "1x4"))
