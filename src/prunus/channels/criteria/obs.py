"""Structured optimal brain surgeon on the inputs of the readers.

E. Kurtic et al., "ZipLM", 2023, https://arxiv.org/abs/2302.04089, algorithm 1: units go one at a
time, the one whose removal costs the reader's output least under the best update of all others.
G. Ling et al., "SlimGPT", 2024, https://arxiv.org/abs/2412.18110, does it for heads. The loss of
removing columns S from W is ``tr(W_S (H^-1_SS)^-1 W_S^T)`` with H the Gram matrix of the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunus.channels.criteria.base import CRITERIA, Evidence
from prunus.channels.groups import Group, Slot
from prunus.channels.moments import InputMoments, damped, weight_matrix


@dataclass(frozen=True)
class OBS:
    """A unit's score is the loss of all units up to it, in the order of greedy elimination.

    In shares of the reader's output energy, so that layers compare. What is left of the readers is
    refitted, which is the exact update of all eliminations together.
    """

    name: ClassVar[str] = "obs"
    comparable: ClassVar[bool] = True
    update: ClassVar[str] = "weights"

    damp: float = 1e-3
    """added to the diagonal of H, in shares of its mean"""

    def score(self, groups: Sequence[Group], evidence: Evidence) -> dict[str, Tensor]:
        moments = evidence.inputs(groups, gram=True, what="criterion 'obs'")
        scores = {}
        for group in groups:
            if readers := evidence.readers(group):
                sides = [self._side(slot, moments[slot.module], evidence) for slot in readers]
                scores[group.name] = eliminate(sides)
        return scores

    def _side(self, slot: Slot, m: InputMoments, evidence: Evidence) -> Side:
        w = weight_matrix(evidence.model.get_submodule(slot.module)).double()
        gram = damped(m.centered(), self.damp)
        kernel = torch.arange(m.kernel)
        columns = (slot.index.unsqueeze(2) * m.kernel + kernel).flatten(1).to(w.device)
        energy = float(((w @ gram) * w).sum().clamp_min(1e-30))
        return Side(w.clone(), torch.linalg.inv(gram), columns, energy)


@dataclass
class Side:
    """One reader: w is (rows, d), inverse (d, d), columns (units, k) of each unit."""

    w: Tensor
    inverse: Tensor
    columns: Tensor
    energy: float

    def losses(self) -> Tensor:
        """(units,) what removing each unit costs now, as a share of the energy."""
        index = self.columns
        blocks = self.inverse[index.unsqueeze(2), index.unsqueeze(1)]
        w = self.w[:, index].permute(1, 2, 0)  # (units, k, rows)
        eye = torch.eye(blocks.shape[-1], dtype=w.dtype, device=w.device)
        gone = blocks.diagonal(dim1=1, dim2=2).abs().amax(1) <= 0
        blocks = torch.where(gone[:, None, None], eye, blocks)
        losses: Tensor = (w * torch.linalg.solve(blocks, w)).sum((1, 2)) / self.energy
        return losses

    def remove(self, unit: int) -> None:
        """Update all other columns for the loss of this unit's, and forget it."""
        index = self.columns[unit]
        block = self.inverse[index][:, index]
        rows = torch.linalg.solve(block, self.inverse[index])
        self.w -= self.w[:, index] @ rows
        self.inverse -= self.inverse[:, index] @ rows
        self.w[:, index] = 0
        self.inverse[index] = 0
        self.inverse[:, index] = 0


def eliminate(sides: Sequence[Side]) -> Tensor:
    """(units,) the loss accumulated when each unit goes, the cheapest first; changes the sides."""
    count = len(sides[0].columns)
    scores = torch.zeros(count, dtype=torch.float64)
    left = torch.ones(count, dtype=torch.bool, device=sides[0].w.device)
    total = 0.0
    for _ in range(count):
        losses = torch.stack([side.losses() for side in sides]).sum(0)
        losses[~left] = torch.inf
        unit = int(losses.argmin())
        total += max(float(losses[unit]), 0.0)
        scores[unit] = total
        left[unit] = False
        for side in sides:
            side.remove(unit)
    return scores


CRITERIA.add(OBS.name, OBS)
