"""No criterion at all: what every other one should beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunus.channels.criteria.base import CRITERIA, Evidence
from prunus.channels.groups import Group


@dataclass(frozen=True)
class Random:
    """Uniform random scores, the same for the same seed."""

    name: ClassVar[str] = "random"
    comparable: ClassVar[bool] = True
    update: ClassVar[str] = "none"

    seed: int = 0

    def score(self, groups: Sequence[Group], evidence: Evidence) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        return {
            group.name: torch.rand(group.size, generator=generator, dtype=torch.float64)
            for group in groups
        }


CRITERIA.add(Random.name, Random)
