"""The scale of the channel's BatchNorm.

Z. Liu et al., "Learning efficient convolutional networks through network slimming", 2017,
https://arxiv.org/abs/1708.06519. Meant for models trained with an L1 penalty on these scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from prunus.channels.criteria.base import CRITERIA, Evidence, float_scores
from prunus.channels.groups import Group


@dataclass(frozen=True)
class Gamma:
    """Mean ``|gamma|`` over the BatchNorms of a unit. Groups without BatchNorm stay whole."""

    name: ClassVar[str] = "gamma"
    comparable: ClassVar[bool] = True
    update: ClassVar[str] = "none"

    def score(self, groups: Sequence[Group], evidence: Evidence) -> dict[str, Tensor]:
        scores = {}
        for group in groups:
            scales = [
                float_scores(evidence.slices(slot).abs().mean(1))
                for slot in group.slots
                if slot.parameter.endswith("weight")
                and isinstance(evidence.model.get_submodule(slot.module), _BatchNorm)
            ]
            if scales:
                scores[group.name] = torch.stack(scales).mean(0)
        if not scores:
            raise ValueError("criterion 'gamma': no group has a BatchNorm; use 'magnitude'")
        return scores


CRITERIA.add(Gamma.name, Gamma)
