"""Fluctuation: what a channel varies by cannot be put into a bias.

Y. An et al., "Fluctuation-based adaptive structured pruning for large language models" (FLAP),
2024, https://arxiv.org/abs/2312.11983: ``var(x_j) * ||W_:j||^2``, and the mean of what goes is
added to the bias of the reader. Scores are standardized in each layer before they are ranked
together, as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunus.channels.criteria.base import CRITERIA, Evidence, by_column, squared_columns
from prunus.channels.groups import Group
from prunus.channels.moments import weight_matrix


@dataclass(frozen=True)
class FLAP:
    """Sum over readers of the variance of the inputs times the squared norm of their columns."""

    name: ClassVar[str] = "flap"
    comparable: ClassVar[bool] = True
    update: ClassVar[str] = "bias"

    def score(self, groups: Sequence[Group], evidence: Evidence) -> dict[str, Tensor]:
        moments = evidence.inputs(groups, gram=False, what="criterion 'flap'")
        scores = {}
        for group in groups:
            total = torch.zeros(group.size, dtype=torch.float64)
            for slot in evidence.readers(group):
                m = moments[slot.module]
                w = weight_matrix(evidence.model.get_submodule(slot.module))
                total += by_column(m.variance.cpu() * squared_columns(w).cpu(), slot, m.kernel)
            if evidence.readers(group):
                scores[group.name] = (total - total.mean()) / total.std().clamp_min(1e-30)
        return scores


CRITERIA.add(FLAP.name, FLAP)
