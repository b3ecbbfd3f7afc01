"""The norm of a unit's weights.

H. Li et al., "Pruning filters for efficient ConvNets", 2017, https://arxiv.org/abs/1608.08710 (L1
of a filter). Here the norm is taken over the coupled group: what writes the channel and what reads
it, each relative to the mean of its tensor's units, so that no tensor counts more for its size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunus.channels.criteria.base import CRITERIA, Evidence, float_scores
from prunus.channels.groups import Group


@dataclass(frozen=True)
class Magnitude:
    """Sum over the tensors of ``||w_unit||_p / mean ||w||_p``."""

    name: ClassVar[str] = "magnitude"
    comparable: ClassVar[bool] = False
    update: ClassVar[str] = "none"

    p: int = 2
    """1 or 2: the norm"""

    def __post_init__(self) -> None:
        if self.p not in (1, 2):
            raise ValueError(f"p={self.p} is no norm of this criterion; use 1 or 2")

    def score(self, groups: Sequence[Group], evidence: Evidence) -> dict[str, Tensor]:
        return {group.name: self._of(group, evidence) for group in groups}

    def _of(self, group: Group, evidence: Evidence) -> Tensor:
        weights = [s for s in group.slots if s.role in ("out", "in", "other")] or group.slots
        total = torch.zeros(group.size, dtype=torch.float64)
        for slot in weights:
            norms = float_scores(evidence.slices(slot).float().norm(self.p, dim=1))
            total += norms / norms.mean().clamp_min(1e-30)
        return total


CRITERIA.add(Magnitude.name, Magnitude)
