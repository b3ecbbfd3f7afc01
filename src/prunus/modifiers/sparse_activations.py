"""The recipe entry ``sparse_activations``: convolutions that read few sites of their input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from prunus.core.selection import select
from prunus.modifiers.base import MODIFIERS, Context, Run
from prunus.modifiers.fields import as_in_recipes
from prunus.modifiers.schedules import Schedule
from prunus.modifiers.state_checks import check_fields
from prunus.modifiers.timing import Interval
from prunus.spatial import SiteChoice, SparseInputs


@dataclass(frozen=True)
class SparseActivations:
    """Keep a share of the sites of some convolutions' inputs, fewer and fewer while training.

    What is kept in each example are the sites of the largest norm, and the convolution outputs
    nothing at the others. The masks stay on the model when training is over, since it has learnt to
    work with them. They are ``masks`` of the run among the session's ``runs``:
    `prunus.spatial.run_sparse` with them runs those layers as submanifold convolutions, and
    ``masks.remove()`` takes them off.
    """

    name: ClassVar[str] = "sparse_activations"
    one_shot: ClassVar[bool] = False

    layers: tuple[str, ...]
    """convolutions by name, glob, class or `re:` regex; of stride 1, centred, in one group"""
    share: float | Schedule = 0.5
    """of the sites to keep: a number, or `{from: 1.0, to: 0.3, curve: cubic}`"""
    window: Interval | None = None
    """when; default: all of training"""

    def __post_init__(self) -> None:
        as_in_recipes(self)
        for value in self.schedule.extremes:
            SiteChoice(share=value)

    @property
    def schedule(self) -> Schedule:
        return self.share if isinstance(self.share, Schedule) else Schedule(to=self.share)

    def bind(self, context: Context) -> SparseActivationsRun:
        return SparseActivationsRun(self, context)


MODIFIERS.add(SparseActivations.name, SparseActivations)


class SparseActivationsRun(Run):
    """Writes the share of the moment into the masks."""

    def __init__(self, modifier: SparseActivations, context: Context) -> None:
        self.schedule = modifier.schedule
        layers = select(context.model, modifier.layers).layers
        window, timeline = modifier.window or Interval(), context.timeline
        self.begin, self.end = window.begin(timeline), window.begin(timeline)
        if self.schedule.kind != "constant":
            self.begin, self.end = window.span(timeline)
        first = self.schedule(0.0) if self.begin == 0 else 1.0
        names = {id(m): name for name, m in context.model.named_modules()}
        chosen = [names[id(layer.module)] for layer in layers]
        self.masks = SparseInputs(context.model, chosen, SiteChoice(share=first))

    def _set(self, step: int) -> None:
        if step >= self.begin:
            progress = (step - self.begin) / max(1, self.end - self.begin)
            self.masks.choice.share = self.schedule(progress)

    def before_step(self, step: int) -> None:
        self._set(step)

    def prune(self, step: int) -> None:
        self._set(step)

    def finish(self, step: int) -> None:
        self.masks.choice.share = self.schedule.final

    def timetable(self) -> list[tuple[int, str]]:
        sites = f"{100 * self.schedule.final:.0f} % of the sites"
        return [(self.end, f"sparse activations: {sites} in {len(self.masks.names)} layers")]

    def state_dict(self) -> dict[str, Any]:
        return {"share": self.masks.choice.share}

    def check_state(self, state: dict[str, Any]) -> None:
        check_fields(state, share=(float, int))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.masks.choice.share = state["share"]
