"""The recipe entry ``keep``: what is zero stays zero while the other weights train on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from prunus.calibration.calibration import first_pass
from prunus.core.layers import Layer
from prunus.core.selection import select
from prunus.modifiers.base import MODIFIERS, Context, Run, log
from prunus.modifiers.events import counted, pruning_event
from prunus.modifiers.fields import as_in_recipes
from prunus.modifiers.state_checks import check_fields
from prunus.modifiers.timing import Interval


@dataclass(frozen=True)
class Keep:
    """Fine-tune a sparse model: weights that are zero when training begins stay zero.

    Whatever has put the zeros there, N:M and blocks too. Layers that another entry masks are left
    to it. The first step raises ValueError if none of the layers has a zero.
    """

    name: ClassVar[str] = "keep"
    one_shot: ClassVar[bool] = False

    layers: tuple[str, ...] | None = None
    """names, globs, class names or `re:` regexes; default: all but what
    reads the input, writes the output or routes to experts"""
    exclude: tuple[str, ...] = ()
    """what to leave out of `layers`"""
    window: Interval | None = None
    """when; the zeros are those at its beginning, and after its end they train again. Default: all
    of training"""

    allow_dense: bool = False
    """no error if there is no zero at all: nothing is kept then"""

    def __post_init__(self) -> None:
        as_in_recipes(self)

    def bind(self, context: Context) -> Run:
        return KeepRun(self, context)


MODIFIERS.add(Keep.name, Keep)


class KeepRun(Run):
    """Takes the masks before the first step of its window and puts them on after each step."""

    def __init__(self, modifier: Keep, context: Context) -> None:
        self.context, self.allow_dense = context, modifier.allow_dense
        run = first_pass(context.model, context.calibration)
        chosen = select(context.model, modifier.layers, modifier.exclude, run)
        self.layers: list[Layer] = chosen.layers
        context.check_held(self.layers)
        self.begin, self.end = (modifier.window or Interval()).bounds(context.timeline)
        self.begun = False

    def before_step(self, step: int) -> None:
        if not self.begun and step >= self.begin and (self.end is None or step < self.end):
            self._begin(step)
            self.begun = True

    @torch.no_grad()
    def _begin(self, step: int) -> None:
        free = self._free()
        rows = [counted(layer, "as found", layer.local) for layer in free]
        dense = [row.name for row in rows if row.zeros == 0]
        if len(dense) == len(self.layers) and not self.allow_dense:
            raise ValueError(
                f"'keep' found no zero in {dense[0]} or any other of its {len(dense)} layers; load "
                "the sparse weights before training, or name the pruned layers with 'layers'"
            )
        if dense and not self.allow_dense:
            log.warning("keep: no zeros in %s; trained as dense layers", ", ".join(dense))
        for layer, row in zip(free, rows, strict=True):
            if row.zeros:
                self.context.mask(self, layer, layer.local != 0)
        kept = [row for row in rows if row.zeros]
        if kept:
            self.context.record(pruning_event("keep", "as found", kept, step, None))

    def _free(self) -> list[Layer]:
        """The layers that no other entry masks yet."""
        masks = self.context.masks
        free = [x for x in self.layers if not masks.is_owned(x)]
        for layer in free:
            if parts := masks.owned_parts(layer):
                raise ValueError(
                    f"'keep' takes all of {layer.name}, and another entry {parts[0]}; exclude the "
                    "layer, or name its other thirds"
                )
        return free

    @property
    def span(self) -> tuple[float, float]:
        """None: what it masks is what no other run does."""
        return 0, 0

    @property
    def owned(self) -> list[Layer]:
        """The layers, or thirds of them, whose masks this run keeps on."""
        return self.context.masks.owned(self, self.layers)

    def apply_masks(self, step: int) -> None:
        self.context.apply_masks(self)
        if self.end is not None and step >= self.end:
            for layer in self.owned:
                self.context.masks.lift(layer)

    def timetable(self) -> list[tuple[int, str]]:
        message = [(self.begin, f"keep the zeros of {len(self.layers)} layers")]
        return message if self.end is None else [*message, (self.end, "let the zeros train")]

    def state_dict(self) -> dict[str, Any]:
        return {"begun": self.begun, "owned": [layer.name for layer in self.owned]}

    def check_state(self, state: dict[str, Any]) -> None:
        check_fields(state, begun=bool, owned=list)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.begun = bool(state["begun"])
        self.context.masks.own(self, self.layers, state["owned"])
