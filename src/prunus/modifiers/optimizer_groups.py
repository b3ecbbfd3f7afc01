"""The recipe entries ``learning_rate`` and ``weight_decay``: settings of the optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from prunus.modifiers.base import MODIFIERS, Context, Run
from prunus.modifiers.fields import as_in_recipes
from prunus.modifiers.schedules import Schedule
from prunus.modifiers.timing import Interval


@dataclass(frozen=True)
class GroupSchedule(Schedule):
    """A schedule for one setting of the optimizer's parameter groups."""

    setting: ClassVar[str]
    one_shot: ClassVar[bool] = False

    window: Interval | None = None
    """when; default: all of training. Outside it the loop's own value counts"""
    groups: tuple[int, ...] | None = None
    """numbers of the parameter groups; default: all, those that are added later too"""

    def __post_init__(self) -> None:
        super().__post_init__()
        as_in_recipes(self)
        for value in self.extremes:
            if value < 0:
                raise ValueError(f"{self.setting}={value:g} is negative; give 0 or more")

    def bind(self, context: Context) -> Run:
        return GroupRun(self, context)


@dataclass(frozen=True)
class LearningRate(GroupSchedule):
    """Set the learning rate before each step; a group's own ``lr_scale`` (timm) multiplies it."""

    name: ClassVar[str] = "learning_rate"
    setting: ClassVar[str] = "lr"


@dataclass(frozen=True)
class WeightDecay(GroupSchedule):
    """Set the weight decay before each step, in groups that have any."""

    name: ClassVar[str] = "weight_decay"
    setting: ClassVar[str] = "weight_decay"


MODIFIERS.add(LearningRate.name, LearningRate)
MODIFIERS.add(WeightDecay.name, WeightDecay)


class GroupRun(Run):
    """Writes the value of the moment into the parameter groups."""

    def __init__(self, modifier: GroupSchedule, context: Context) -> None:
        self.modifier, self.optimizer = modifier, context.optimizer
        groups = self.optimizer.param_groups
        chosen = range(len(groups)) if modifier.groups is None else modifier.groups
        for index in chosen:
            if not 0 <= index < len(groups):
                raise ValueError(f"groups: the optimizer has {len(groups)}, there is no {index}")
        if any(modifier.setting not in groups[i] for i in chosen):
            kind = type(self.optimizer).__name__
            raise ValueError(f"{kind} has no {modifier.setting!r} to set; drop this modifier")
        self.indices = [] if modifier.groups is None else list(modifier.groups)
        self.seen = 0
        """groups that are in `indices` or spared; `add_param_group` may make more"""
        self._follow_groups()
        window, timeline = modifier.window or Interval(), context.timeline
        self.begin, self.end = window.bounds(timeline)
        if modifier.kind != "constant":
            self.begin, self.end = window.span(timeline)
        self.cycle = None
        if modifier.cycle is not None and self.end is not None:
            self.cycle = timeline.cycle(modifier.cycle, self.end - self.begin)

    def _follow_groups(self) -> None:
        """Take in groups that are new. Those of weight decay 0 (biases, norms) shall stay so."""
        groups = self.optimizer.param_groups
        if self.modifier.groups is None:
            setting = self.modifier.setting
            new = range(self.seen, len(groups))
            self.indices += [i for i in new if setting == "lr" or groups[i][setting] != 0]
        self.seen = max(self.seen, len(groups))

    def value(self, step: int) -> float:
        if self.end is None:
            return self.modifier.final
        return self.modifier((step - self.begin) / max(1, self.end - self.begin), self.cycle)

    def before_step(self, step: int) -> None:
        if step < self.begin or (self.end is not None and step >= self.end):
            return
        self._follow_groups()
        value = self.value(step)
        for index in self.indices:
            group = self.optimizer.param_groups[index]  # load_state_dict makes new ones
            scale = group.get("lr_scale", 1.0) if self.modifier.setting == "lr" else 1.0
            present = group[self.modifier.setting]
            if isinstance(present, torch.Tensor):  # capturable and compiled optimizers
                present.fill_(value * scale)
            else:
                group[self.modifier.setting] = value * scale

    def timetable(self) -> list[tuple[int, str]]:
        name, end = self.modifier.setting, self.begin if self.end is None else self.end
        first = (self.begin, f"{name} {self.value(self.begin):g}")
        if end == self.begin:
            return [first]
        kind = self.modifier.kind
        kind += f", anew every {self.modifier.cycle}" if self.modifier.cycle else ""
        return [first, (end, f"{name} {self.value(end):g} ({kind})")]
