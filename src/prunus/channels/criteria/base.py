"""What criteria have in common: the weights, and what calibration data show of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from prunus.calibration.calibration import Calibration
from prunus.channels.groups import Channels, Group, Slot
from prunus.channels.moments import InputMoments, input_moments, is_reader
from prunus.core.names import Registry


@dataclass
class Evidence:
    """A model, its groups, and calibration data that are read when a criterion asks for them."""

    model: nn.Module
    found: Channels
    calibration: Calibration | None = None
    moments: dict[str, InputMoments] = field(default_factory=dict)
    """reader -> what its inputs were; filled by `inputs`"""

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}

    def data(self, what: str) -> Calibration:
        """The calibration data. Raises ValueError if there are none."""
        if self.calibration is None:
            raise ValueError(f"{what} needs data: pass calibration=prunus.Calibration(batches)")
        return self.calibration

    def slices(self, slot: Slot, values: Tensor | None = None) -> Tensor:
        """(units, entries) what each unit owns of the parameter, or of ``values`` like it."""
        t = (self.tensors[slot.parameter] if values is None else values).detach()
        index = slot.index.to(t.device)
        return t.movedim(slot.dim, 0)[index.flatten()].reshape(len(index), -1)

    def readers(self, group: Group) -> list[Slot]:
        """Slots of linear layers and ungrouped convolutions that read the channels."""
        return [s for s in group.slots if s.role == "in" and is_reader(self.model, s.module)]

    def inputs(self, groups: Sequence[Group], gram: bool, what: str) -> dict[str, InputMoments]:
        """Moments of what each reader of the groups is given, from one pass over the data."""
        names = {slot.module for group in groups for slot in self.readers(group)}
        missing = {
            n for n in names if n not in self.moments or (gram and self.moments[n].gram is None)
        }
        if missing:
            self.moments.update(input_moments(self.model, self.data(what), missing, gram))
        return {name: self.moments[name] for name in names}


@runtime_checkable
class Criterion(Protocol):
    """A frozen dataclass; ``name`` is what `shrink` calls it. The lowest scores go."""

    name: ClassVar[str]
    comparable: ClassVar[bool]
    """whether scores of different groups can be ranked together as they are"""
    update: ClassVar[str]
    """what the readers get by default when units are gone: ``none``, ``bias`` or ``weights``"""

    def score(self, groups: Sequence[Group], evidence: Evidence) -> dict[str, Tensor]:
        """Group name -> (units,) importance. A group without an entry stays whole."""
        ...


CRITERIA: Registry[Criterion] = Registry("criterion")


def by_column(values: Tensor, slot: Slot, kernel: int) -> Tensor:
    """(units,) sums of values that are one for each column of the reader's matrix."""
    per_channel = values.reshape(-1, kernel).sum(1).cpu()
    return per_channel[slot.index].sum(1)


def squared_columns(w: Tensor) -> Tensor:
    return w.double().square().sum(0)


def float_scores(scores: Tensor) -> Tensor:
    return torch.nan_to_num(scores.double().cpu())
