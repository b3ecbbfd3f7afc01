"""How large the channel is on data.

S. Muralidharan et al., "Compact language models via pruning and knowledge distillation" (Minitron),
2024, https://arxiv.org/abs/2407.14679, section 2.2: mean absolute activation; for heads the norm of
what a head puts out. Here it is measured where the channel is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunus.channels.criteria.base import CRITERIA, Evidence, by_column
from prunus.channels.groups import Group


@dataclass(frozen=True)
class Activation:
    """Mean ``|x|`` of the unit's channels at each of its readers. Groups that none reads stay."""

    name: ClassVar[str] = "activation"
    comparable: ClassVar[bool] = False
    update: ClassVar[str] = "none"

    def score(self, groups: Sequence[Group], evidence: Evidence) -> dict[str, Tensor]:
        moments = evidence.inputs(groups, gram=False, what="criterion 'activation'")
        scores = {}
        for group in groups:
            found = []
            for slot in evidence.readers(group):
                m = moments[slot.module]
                found.append(by_column(m.absolute / m.count, slot, m.kernel))
            if found:
                scores[group.name] = torch.stack(
                    [f / f.mean().clamp_min(1e-30) for f in found]
                ).mean(0)
        return scores


CRITERIA.add(Activation.name, Activation)
