"""The recipe entry ``prune`` at work where its masking trains N:M weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prunus.distributed import gather, scatter, shards_of
from prunus.layers import Layer, reshard
from prunus.masking import Hard, local
from prunus.modifiers.base import Context, Run, log
from prunus.modifiers.pruning_run import check_held, pruning_event, put_mask
from prunus.modifiers.trained import Trained
from prunus.modifiers.watching import Watch
from prunus.selection import select
from prunus.structure import Groups, fitting, stages
from prunus.timing import Window
from prunus.training_masks import MDGF, STE

if TYPE_CHECKING:
    from prunus.modifiers.prune import PruningModifier


class TrainingRun(Run):
    """Dense before the window; in it masks chosen anew after each step; frozen and hard after it.

    Between steps the parameters are the hidden weights that the network computes with, and
    ``dense`` holds those that the optimizer trains. ``shown`` is the beta of what is in the
    parameters, None while that is the dense weight.
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
        self.trained = [Trained(layer, self._patterns_of(layer)) for layer in self.layers]
        if context.optimizer is not None:
            check_held(context.optimizer, self.layers)
        self.begin, self.end = (modifier.window or Window()).span(context.timeline)
        self.beta, self.frozen, self.resumed = 1.0, False, False
        self.shown: float | None = None
        self.watch: Watch | None = None

    def _patterns_of(self, layer: Layer) -> list[Groups]:
        """Those that divide the layer's part on this rank, of named structures."""
        shape = tuple(layer.local.shape)
        size, channels = layer.matrix_shape(shape), layer.channels(shape)
        try:
            return fitting(self.modifier.structure, self.patterns, size, channels)
        except ValueError as error:
            raise ValueError(f"{layer.name}: {error}") from None

    def prepare(self) -> None:
        if isinstance(self.masking, MDGF) and self.masking.eval == "hard":
            modules = [layer.module for layer in self.layers]
            self.watch = Watch(self.context.model, modules, self._look)
        if self.begin == 0 and not self.layers[0].weight.is_meta:
            self._mask(0)

    def _mask(self, step: int) -> None:
        """Choose masks from the dense weights, which are in the parameters, and hide these."""
        progress = (step - self.begin) / max(1, self.end - self.begin)
        for t in self.trained:
            self._put(t.layer, t.choose(progress))
            if t.dense is None:
                t.dense = torch.empty_like(t.layer.local)
        self.beta = self.masking.beta(step - self.begin, self.end - self.begin)
        torch._foreach_copy_(self._dense(), self._weights())
        self._hide(self.beta)

    def _put(self, layer: Layer, mask: Tensor) -> None:
        part = None if layer.third is None else layer.part
        self.context.masks.put(layer.parameter_name, layer.weight, mask, part)
        self.context.owners[layer.name] = self

    def _hide(self, beta: float) -> None:
        """Dense weights, which are in the parameters, to hidden ones."""
        self.masking.hide(self._weights(), self._masks(), beta)
        self.shown = beta
        for t in self.trained:
            t.mark()

    def show(self, beta: float) -> None:
        """Other hidden weights in place of those in the parameters."""
        torch._foreach_copy_(self._weights(), self._dense())
        self._hide(beta)

    def _weights(self) -> list[Tensor]:
        return [t.layer.local for t in self.trained]

    def _dense(self) -> list[Tensor]:
        return [t.dense for t in self.trained if t.dense is not None]

    def _masks(self) -> list[Tensor]:
        masks = self.context.masks
        return [t.layer.part(masks[t.layer.parameter_name]) for t in self.trained]

    @torch.no_grad()
    def before_update(self, step: int) -> None:
        if self.frozen or self.shown is None:
            return  # a closure called again finds the dense weights already there
        self._restore()
        grads, weights, masks = [], [], []
        for t, mask in zip(self.trained, self._masks(), strict=True):
            if t.layer.weight.grad is not None:
                grads.append(t.layer.part(local(t.layer.weight.grad)))
                weights.append(t.layer.local)
                masks.append(mask)
        scaled = getattr(self.context.optimizer, "grad_scale", None)
        c = 1.0 if scaled is None else float(scaled)
        if grads:
            self.masking.treat(grads, weights, masks, self.beta, c)

    def _restore(self) -> None:
        """The dense weights back into the parameters; in the log, where that could not be."""
        if others := self._put_back():
            log.warning(
                "the weights of %d layers were written between two steps; N:M training goes on "
                "from what is there now",
                others,
            )

    def _put_back(self) -> int:
        """The same in silence: how many layers keep what others have written to them."""
        written = [False] * len(self.trained) if self.resumed else self._written()
        kept = [t for t, other in zip(self.trained, written, strict=True) if not other]
        self.shown, self.resumed = None, False
        if kept:
            dense = [t.dense for t in kept if t.dense is not None]
            torch._foreach_copy_([t.layer.local for t in kept], dense)
        return len(self.trained) - len(kept)

    def _written(self) -> list[bool]:
        """For each layer whether its parameter holds anything but what was put there."""
        assert self.shown is not None
        pairs = zip(self.trained, self._masks(), strict=True)
        return [t.written(self.masking, mask, self.shown) for t, mask in pairs]

    def settle(self, step: int) -> None:
        if self.frozen:
            owned = [x for x in self.layers if self.context.owners.get(x.name) is self]
            masks = [x.part(self.context.masks[x.parameter_name]) for x in owned]
            Hard().hide([x.local for x in owned], masks)
        elif step >= self.end:
            self._freeze(step)
        elif step >= self.begin:
            self._mask(step)

    def skipped(self, step: int) -> None:
        if self.shown is None and self.trained[0].dense is not None:
            self._hide(self.beta)

    def _freeze(self, step: int) -> None:
        """The last masks, from the dense weights in the parameters; hard from now on."""
        rows = []
        for t in self.trained:
            mask = t.choose(1.0)
            put_mask(self.context, self, t.layer, mask)
            Hard().hide([t.layer.local], [mask])
            rows.append(t.row(mask))
            t.dense = None
        self.frozen, self.shown = True, None
        self._unwatch()
        target = self.modifier.method.pattern.fixed
        self.context.record(pruning_event(self.modifier, rows, step, target))

    @torch.no_grad()
    def finish(self, step: int) -> None:
        if not self.frozen:
            if self.shown is not None:
                self._restore()
            self._freeze(step)

    @property
    def span(self) -> tuple[int, int]:
        """Steps between which masks are chosen anew."""
        return self.begin, self.end

    @property
    def due(self) -> int | None:
        return None if self.frozen else self.end

    def release(self) -> None:
        self._unwatch()

    @torch.no_grad()
    def _look(self, training: bool) -> None:
        if self.frozen or self.shown is None:
            return
        wanted = self.beta if training else 0.0
        # the second time in a forward pass there is nothing to do, which autograd relies on
        if wanted != self.shown or (self.resumed and any(self._written())):
            reshard(self.context.model)
            self.show(wanted)

    def _unwatch(self) -> None:
        if self.watch is not None:
            self.watch.close()

    def plan(self) -> list[tuple[int, str]]:
        pattern, masking = self.modifier.pattern, self.masking.name
        span, count = self.end - self.begin, len(self.patterns)
        steps = [self.begin + -(-span * i // count) for i in range(count)]
        said = [(s, f"{masking}: train {p}") for s, p in zip(steps, self.patterns, strict=True)]
        return [*said, (self.end, f"{masking}: freeze the masks, {pattern}")]

    def memory(self) -> dict[str, int]:
        """Bytes beyond the model while the window lasts."""
        weights = [layer.local for layer in self.layers]
        masks = sum(w.numel() for w in weights)
        return {"masks": masks, "dense weights": sum(w.nbytes for w in weights)}

    def state_dict(self) -> dict[str, Any]:
        dense = {}
        for t in self.trained:
            if t.dense is not None and self.shown is not None:
                whole = gather(t.dense, t.layer.weight) if t.layer.third is None else t.dense
                dense[t.layer.name] = whole.detach().clone()
        owned = [x.name for x in self.layers if self.context.owners.get(x.name) is self]
        return {"frozen": self.frozen, "beta": self.beta, "dense": dense, "owned": owned}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.shown is not None:  # attaching has hidden weights that were loaded before
            self._put_back()
        self.frozen, self.beta = bool(state["frozen"]), float(state["beta"])
        for t in self.trained:
            kept = state["dense"].get(t.layer.name)
            t.dense = None
            if kept is not None:
                whole = scatter(kept, t.layer.weight) if t.layer.third is None else kept
                t.dense = whole.to(t.layer.local, copy=True)
            if t.layer.name in state["owned"]:
                self.context.owners[t.layer.name] = self
        if state["dense"]:
            self.show(self.beta)
            self.resumed = True  # the model's own state may be loaded after this
        if self.frozen:
            self._unwatch()
