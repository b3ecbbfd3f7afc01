"""First-order change of the loss when a unit goes.

P. Molchanov et al., "Importance estimation for neural network pruning", 2019,
https://arxiv.org/abs/1906.10771, equation 8: the squared sum of gradient times weight over the
group, averaged over batches. Summed here over what writes and shifts the channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunus.calibration.calibration import undisturbed
from prunus.channels.criteria.base import CRITERIA, Evidence, float_scores
from prunus.channels.groups import Group
from prunus.core.progress import track


@dataclass(frozen=True)
class Taylor:
    """Mean over batches of ``(sum of g * w)^2`` over a unit's weights."""

    name: ClassVar[str] = "taylor"
    comparable: ClassVar[bool] = True
    update: ClassVar[str] = "none"

    def score(self, groups: Sequence[Group], evidence: Evidence) -> dict[str, Tensor]:
        calibration = evidence.data("criterion 'taylor'")
        model = evidence.model
        parameters = [p for p in model.parameters() if p.requires_grad]
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        scores = {g.name: torch.zeros(g.size, dtype=torch.float64) for g in groups}
        with undisturbed(model, calibration), torch.enable_grad():
            for batch in track(calibration, "gradients of the loss"):
                loss = calibration.loss(model, batch)
                grads = torch.autograd.grad(loss, parameters, allow_unused=True)
                products = {
                    name: p.detach() * g
                    for name, p, g in zip(names, parameters, grads, strict=True)
                    if g is not None
                }
                for group in groups:
                    scores[group.name] += _change(group, evidence, products).square()
        return scores


def _change(group: Group, evidence: Evidence, products: dict[str, Tensor]) -> Tensor:
    total = torch.zeros(group.size, dtype=torch.float64)
    for slot in group.slots:
        if slot.role != "in" and slot.parameter in products:
            total += float_scores(evidence.slices(slot, products[slot.parameter]).sum(1))
    return total


CRITERIA.add(Taylor.name, Taylor)
