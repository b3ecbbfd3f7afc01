"""The recipe entry ``prune`` at work where its masking trains N:M weights."""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from prunus.core.layers import Layer, reshard
from prunus.core.masks import Hard
from prunus.core.selection import select
from prunus.core.sharding import shards_of
from prunus.modifiers.base import Context, Run, log
from prunus.modifiers.nm.eval_hook import EvalModeHook
from prunus.modifiers.nm.layer_state import NMLayerState
from prunus.modifiers.nm.maskings import MDGF, STE
from prunus.modifiers.nm.stages import Groups, fitting, stages
from prunus.modifiers.nm.state import NMState
from prunus.modifiers.pruning_run import check_held, mask_bytes, pruning_event, put_mask
from prunus.modifiers.timing import Window

if TYPE_CHECKING:
    from prunus.modifiers.prune import PruningModifier


class TrainingRun(Run):
    """Dense before the window; in it masks chosen anew after each step; frozen and hard after it.

    Between steps the parameters are the hidden weights that the network computes with, and
    ``dense`` holds those that the optimizer trains.
    """

    def __init__(self, modifier: PruningModifier, context: Context) -> None:
        assert isinstance(modifier.masking, STE)
        self.modifier, self.context, self.masking = modifier, context, modifier.masking
        chosen = select(context.model, modifier.layers, modifier.exclude)
        self.left_dense = chosen.left_dense
        self.layers: list[Layer] = modifier.method.fit(chosen.layers)
        target: Any = modifier.method.pattern
        shards_of(self.layers, target)  # raises for what cannot be masked
        self.patterns = stages(modifier.structure, target)
        trained = [NMLayerState(layer, self._patterns_of(layer)) for layer in self.layers]
        self.trained = NMState(trained, self.masking, context)
        if context.optimizer is not None:
            check_held(context.optimizer, self.layers)
        self.begin, self.end = (modifier.window or Window()).span(context.timeline)
        self.frozen = False
        self.watch: EvalModeHook | None = None

    def _patterns_of(self, layer: Layer) -> list[Groups]:
        """Those that divide the layer's part on this rank, of named structures."""
        shape = tuple(layer.local.shape)
        size, channels = layer.matrix_shape(shape), layer.channels(shape)
        try:
            return fitting(self.modifier.structure, self.patterns, size, channels)
        except ValueError as error:
            raise ValueError(f"{layer.name}: {error}") from None

    def on_attach(self) -> None:
        self._watch()
        if self.begin == 0 and not self.layers[0].weight.is_meta:
            self.trained.take()
            self._mask(0)

    def _watch(self) -> None:
        if self.watch is None and isinstance(self.masking, MDGF) and self.masking.eval == "hard":
            modules = [layer.module for layer in self.layers]
            self.watch = EvalModeHook(self.context.model, modules, self._look)

    def _unwatch(self) -> None:
        if self.watch is not None:
            self.watch.close()
        self.watch = None

    def _mask(self, step: int) -> None:
        """Choose masks from the dense weights, which are in the parameters, and hide these."""
        progress = (step - self.begin) / max(1, self.end - self.begin)
        beta = self.masking.beta(step - self.begin, self.end - self.begin)
        for t in self.trained:
            t.zero_pruned()
            part = None if t.layer.qkv_part is None else t.layer.part
            mask = t.choose(progress)
            self.context.masks.put(t.layer.parameter_name, t.layer.weight, mask, part)
            self.context.take(t.layer, self)
        self.trained.hide_all(beta)

    @torch.no_grad()
    def before_update(self, step: int) -> None:
        if not self.trained.hidden:
            return  # a closure called again finds the dense weights already there
        self._restore()
        scaled = getattr(self.context.optimizer, "grad_scale", None)
        self.trained.treat(1.0 if scaled is None else float(scaled))

    def _restore(self) -> None:
        """The dense weights back into the parameters; in the log, where that could not be."""
        if others := self.trained.put_back():
            log.warning(
                "the weights of %d layers were written between two steps; N:M training goes on "
                "from what is there now",
                others,
            )

    def apply_masks(self, step: int) -> None:
        if self.frozen:
            self.context.hide(self, self.layers)
        elif self.trained.begun and step >= self.end:
            self._freeze(step)
        elif self.trained.begun:
            self._mask(step)

    def begin_window(self, step: int) -> None:
        if self.frozen or self.trained.begun or step < self.begin:
            return
        self.trained.take()
        if step >= self.end:
            self._freeze(step)
        else:
            self._mask(step)

    def skipped(self, step: int) -> None:
        if self.trained.begun and not self.trained.hidden:
            self.trained.hide(self.trained.beta)

    def _freeze(self, step: int) -> None:
        """The last masks, from the dense weights in the parameters; hard from now on."""
        rows = []
        for t in self.trained:
            mask = t.choose(1.0)
            put_mask(self.context, self, t.layer, mask)
            Hard().apply([t.layer.local], [mask])
            rows.append(t.row(mask))
            t.dense = t.alive = t.shown = None
        self.frozen = True
        self._unwatch()
        target = self.modifier.method.pattern.fixed
        self.context.record(pruning_event(self.modifier, rows, step, target))

    @torch.no_grad()
    def finish(self, step: int) -> None:
        if self.frozen:
            return
        if self.trained.hidden:
            self._restore()
        if not self.trained.begun:
            self.trained.take()
        self._freeze(step)

    @property
    def span(self) -> tuple[int, int]:
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
        return {at for at, _ in self.plan()}

    @torch.no_grad()
    def detach(self) -> None:
        self._unwatch()
        if self.trained.hidden:
            reshard(self.context.model)
            self.trained.put_back()

    @torch.no_grad()
    def _look(self, training: bool) -> None:
        if not self.trained.hidden:
            return
        beta = self.trained.beta if training else 0.0
        # the second time in a forward pass there is nothing to do, which autograd relies on
        if other := self.trained.not_showing(beta):
            reshard(self.context.model)
            self.trained.show(beta, other)

    def plan(self) -> list[tuple[int, str]]:
        masking, span = self.masking.name, self.end - self.begin
        counts: Counter[tuple[int, str]] = Counter()
        for t in self.trained:  # which groups divide them may differ
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
        owned = [x.name for x in self.context.owned(self, self.layers)]
        return {"frozen": self.frozen, **self.trained.state_dict(), "owned": owned}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.trained.hidden:  # attaching has hidden weights that were loaded before
            self.trained.put_back()
        self.frozen = bool(state["frozen"])
        self.trained.load_state_dict(state)
        self.context.owners.update(dict.fromkeys(state["owned"], self))
        if self.frozen:
            self._unwatch()
        else:
            self._watch()
