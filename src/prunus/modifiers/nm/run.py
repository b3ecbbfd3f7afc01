"""The recipe entry ``nm_training`` at work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from prunus.calibration.calibration import Calibration
from prunus.core.layers import Layer
from prunus.core.masks import zero_pruned
from prunus.core.wrappers import reshard
from prunus.engine.fitting import Misfits, reason_of
from prunus.engine.method import misfits_message
from prunus.engine.plan import PruningPlan, mask_bytes
from prunus.modifiers.base import Context, Run, log
from prunus.modifiers.events import pruning_event
from prunus.modifiers.grad_scaler import gradient_scale
from prunus.modifiers.nm.eval_hook import EvalModeHook
from prunus.modifiers.nm.layer_state import NMLayerState
from prunus.modifiers.nm.maskings import MDGF, Masking
from prunus.modifiers.nm.stages import Groups, fitting, stages
from prunus.modifiers.nm.state import NMState
from prunus.modifiers.state_checks import check_fields
from prunus.modifiers.timing import Interval


class Trains(Protocol):
    """What a run needs to know of its modifier."""

    @property
    def masking(self) -> Masking: ...
    @property
    def pattern(self) -> str: ...
    @property
    def target(self) -> Groups: ...
    @property
    def structure(self) -> tuple[str, ...]: ...
    @property
    def misfits(self) -> Misfits: ...
    @property
    def window(self) -> Interval | None: ...
    def plan(self, model: nn.Module, calibration: Calibration | None = None) -> PruningPlan: ...


class NMTrainingRun(Run):
    """Dense before the window; in it masks chosen anew after each step; frozen and hard after it.

    Between steps the parameters are the hidden weights that the network computes with, and
    ``dense`` holds those that the optimizer trains.
    """

    trains: ClassVar[bool] = True

    def __init__(self, modifier: Trains, context: Context) -> None:
        self.modifier, self.context, self.masking = modifier, context, modifier.masking
        plan = modifier.plan(context.model, context.calibration)
        self.spared = plan.spared
        self.patterns = stages(modifier.structure, modifier.target)
        patterns, misfits = self._patterns(plan.layers)
        self.misfits = {**plan.misfits, **misfits}
        self.layers: list[Layer] = list(patterns)
        states = [NMLayerState(layer, fit) for layer, fit in patterns.items()]
        self.state = NMState(states, self.masking, context)
        context.check_held(self.layers)
        self.begin, self.end = (modifier.window or Interval()).span(context.timeline)
        self.frozen = False
        self.eval_hook: EvalModeHook | None = None

    def _patterns(
        self, layers: Sequence[Layer]
    ) -> tuple[dict[Layer, list[Groups]], dict[str, str]]:
        """Those of each layer that fits, and why others do not.

        Raises ValueError unless one fits, and the others may be left dense.
        """
        found: dict[Layer, list[Groups]] = {}
        misfits: dict[str, str] = {}
        for layer in layers:
            try:
                found[layer] = self._patterns_of(layer)
            except ValueError as error:
                if self.modifier.misfits == "error":
                    raise
                misfits[layer.name] = reason_of(error)
        if not found:
            raise ValueError(next(iter(misfits.values())))
        if misfits:
            log.info("%s", misfits_message(misfits))
        return found, misfits

    def _patterns_of(self, layer: Layer) -> list[Groups]:
        """Those that divide the layer's part on this rank, of named structures."""
        shape = tuple(layer.local.shape)
        size, channels = layer.matrix_shape(shape), layer.channels(shape)
        try:
            return fitting(self.modifier.structure, self.patterns, size, channels)
        except ValueError as error:
            raise ValueError(f"{layer.name}: {error}") from None

    def on_attach(self) -> None:
        self._add_hook()
        if self.begin == 0 and not self.layers[0].weight.is_meta:
            self.state.remember_pruned()
            self._mask(0)

    def _add_hook(self) -> None:
        if (
            self.eval_hook is None
            and isinstance(self.masking, MDGF)
            and self.masking.eval == "hard"
        ):
            modules = [layer.module for layer in self.layers]
            self.eval_hook = EvalModeHook(self.context.model, modules, self._show)

    def _remove_hook(self) -> None:
        if self.eval_hook is not None:
            self.eval_hook.close()
        self.eval_hook = None

    def _mask(self, step: int) -> None:
        """Choose masks from the dense weights, which are in the parameters, and hide these."""
        progress = (step - self.begin) / max(1, self.end - self.begin)
        beta = self.masking.beta(step - self.begin, self.end - self.begin)
        for t in self.state:
            t.zero_pruned()
        masks = [t.choose(progress) for t in self.state]
        for t, mask in zip(self.state, masks, strict=True):
            self.context.masks.put(t.layer, mask, self)
        self.state.hide_dense(beta)

    @torch.no_grad()
    def before_update(self, step: int) -> None:
        if not self.state.hidden:
            return  # a closure called again finds the dense weights already there
        self._restore()
        self.state.transform_gradients(gradient_scale(self.context.optimizer))

    def _restore(self) -> None:
        """The dense weights back into the parameters; in the log, where that could not be."""
        if others := self.state.put_back():
            log.warning(
                "the weights of %d layers were written between two steps; N:M training goes on "
                "from what is there now",
                others,
            )

    def apply_masks(self, step: int) -> None:
        if self.frozen:
            self.context.apply_masks(self)
        elif self.state.begun and step >= self.end:
            self._freeze(step)
        elif self.state.begun:
            self._mask(step)

    def begin_window(self, step: int) -> None:
        if self.frozen or self.state.begun or step < self.begin:
            return
        self.state.remember_pruned()
        if step >= self.end:
            self._freeze(step)
        else:
            self._mask(step)

    def skipped(self, step: int) -> None:
        if self.state.begun and not self.state.hidden:
            self.state.apply(self.state.beta)

    def _freeze(self, step: int) -> None:
        """The last masks, from the dense weights in the parameters; hard from now on."""
        masks = [t.choose(1.0) for t in self.state]
        rows = [t.row(mask) for t, mask in zip(self.state, masks, strict=True)]
        for t, mask in zip(self.state, masks, strict=True):
            self.context.mask(self, t.layer, mask)
            zero_pruned([t.layer.local], [mask])
        for t in self.state:
            t.dense = t.alive = t.shown = None
        self.frozen = True
        self._remove_hook()
        target = self.modifier.target
        what = "magnitude", self.modifier.pattern, rows, step, target.fixed
        self.context.record(pruning_event(*what, self.misfits))

    @torch.no_grad()
    def finish(self, step: int) -> None:
        if self.frozen:
            return
        if self.state.hidden:
            self._restore()
        if not self.state.begun:
            self.state.remember_pruned()
        self._freeze(step)

    @property
    def soft(self) -> bool:
        return not self.frozen

    @property
    def span(self) -> tuple[float, float]:
        """Steps between which masks are chosen anew."""
        return self.begin, self.end

    @property
    def due(self) -> int | None:
        return None if self.frozen else self.end

    def next_change(self, step: int) -> int | None:
        """Where a stage begins, or masks are frozen; not what changes at each step within one."""
        return min((at for at in self._changes if at >= step and not self.frozen), default=None)

    @cached_property
    def _changes(self) -> set[int]:
        return {at for at, _ in self.timetable()}

    @torch.no_grad()
    def detach(self) -> None:
        self._remove_hook()
        if self.state.hidden:
            reshard(self.context.model)
            self.state.put_back()

    @torch.no_grad()
    def _show(self, training: bool) -> None:
        if not self.state.hidden:
            return
        beta = self.state.beta if training else 0.0
        # the second time in a forward pass there is nothing to do, which autograd relies on
        if other := self.state.not_showing(beta):
            reshard(self.context.model)
            self.state.show(beta, other)

    def timetable(self) -> list[tuple[int, str]]:
        masking, span = self.masking.name, self.end - self.begin
        counts: Counter[tuple[int, str]] = Counter()
        for t in self.state:  # which groups divide them may differ
            for i, pattern in enumerate(t.patterns):
                counts[self.begin + -(-span * i // len(t.patterns)), str(pattern)] += 1
        message = []
        for (step, name), count in sorted(counts.items(), key=lambda item: item[0][0]):
            some = "" if count == len(self.layers) else f" in {count} of {len(self.layers)} layers"
            message.append((step, f"{masking}: train {name}{some}"))
        return [*message, (self.end, f"{masking}: freeze the masks, {self.modifier.pattern}")]

    def memory(self) -> dict[str, int]:
        """Bytes beyond the model while the window lasts."""
        dense = sum(layer.local.nbytes for layer in self.layers)
        return {"masks": mask_bytes(self.layers), "dense weights": dense}

    def state_dict(self) -> dict[str, Any]:
        owned = [x.name for x in self.context.masks.owned(self, self.layers)]
        return {"frozen": self.frozen, **self.state.state_dict(), "owned": owned}

    def check_state(self, state: dict[str, Any]) -> None:
        check_fields(state, frozen=bool, beta=(float, int), owned=list)
        self.state.check_state(state)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.state.hidden:  # attaching has hidden weights that were loaded before
            self.state.put_back(same_values=False)
        self.frozen = bool(state["frozen"])
        self.state.load_state_dict(state)
        self.context.masks.own(self, self.layers, state["owned"])
        if self.frozen:
            self._remove_hook()
        else:
            self._add_hook()
