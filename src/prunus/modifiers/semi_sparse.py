"""The recipe entry ``semi_sparse``: 2:4 training, sparse both ways while the layers compute."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prunus.calibration.calibration import first_pass
from prunus.core.layers import Layer
from prunus.core.masks import packed, unpack, zero_pruned
from prunus.core.selection import select
from prunus.execution.training import SemiSparse, SemiSparseLinear
from prunus.execution.training.swap import Named, check_semi_sparse, swap_layers, to_dense
from prunus.modifiers.base import MODIFIERS, Context, Run, log
from prunus.modifiers.fields import as_in_recipes
from prunus.modifiers.grad_scaler import gradient_scale
from prunus.modifiers.state_checks import check_fields, check_tensors
from prunus.modifiers.timing import Interval

RECORD_EVERY = 100  # steps between two records of the flip rate, where nobody knows of epochs


@dataclass(frozen=True)
class SemiSparseTraining(SemiSparse):
    """Train Linear layers with 2:4 weights or activations, which sparse tensor cores run faster.

    Masks are chosen by 4 x 4 tile, so that a weight and its transpose are both 2:4, and anew as
    training goes; the weights stay dense. After the window the layers are dense again, to train
    the last part so: the last sixth in Hu et al., "Accelerating Transformer Pre-training with 2:4
    Sparsity", 2024 (https://arxiv.org/abs/2404.01847).
    """

    name: ClassVar[str] = "semi_sparse"
    one_shot: ClassVar[bool] = False

    layers: tuple[str, ...] | None = None
    """names, globs, class names or `re:` regexes; default: every Linear but the output head"""
    exclude: tuple[str, ...] = ()
    """what to leave out of `layers`"""
    window: Interval | None = None
    """when; default: all of training"""
    keep: bool = False
    """for weights: keep the last masks when the window ends, so that the model is 2:4 for good"""

    def __post_init__(self) -> None:
        super().__post_init__()
        as_in_recipes(self)
        if self.keep and self.kind != "weight":
            raise ValueError("keep=true is about the masks of weights; drop it for activations")

    def bind(self, context: Context) -> Run:
        return SemiSparseRun(self, context)


MODIFIERS.add(SemiSparseTraining.name, SemiSparseTraining)


class SemiSparseRun(Run):
    """Swaps the layers at both ends of the window and chooses their masks in between."""

    def __init__(self, modifier: SemiSparseTraining, context: Context) -> None:
        self.modifier, self.context = modifier, context
        self.layers = self._select()
        # a step's own hooks are surer than the count of updates seen in forward passes, and the
        # decay is added once a step, whatever accumulates or scales gradients
        once = replace(self._settings(), refresh=0) if modifier.kind == "weight" else None
        plain = replace(once, gradient="ste") if once and modifier.gradient == "sr_ste" else once
        self.options = plain or self._settings()
        check_semi_sparse(self._named(), self.options)
        context.check_held(self.layers)
        timeline = context.timeline
        self.begin, self.end = (modifier.window or Interval()).bounds(timeline)
        if self.end == self.begin:
            raise ValueError(f"the window is empty: it begins and ends with step {self.begin}")
        if not modifier.keep and modifier.kind == "weight" and self._to_the_end():
            log.warning(
                "training ends with 2:4 weights, but the dense ones are what is left, which no "
                "step has been trained as; end the window earlier (to: 83%) or set keep: true"
            )
        self.active = False
        self.last = 0
        """the step after which masks were chosen last"""
        self.recorded = 0
        """how many periods had passed when flip rates were recorded last"""
        self.period = timeline.steps_per_epoch or RECORD_EVERY

    def _select(self) -> list[Layer]:
        run = first_pass(self.context.model, self.context.calibration)
        names = self.modifier.layers, self.modifier.exclude
        chosen = select(self.context.model, *names, run).layers
        if self.modifier.layers is None:
            chosen = [layer for layer in chosen if isinstance(layer.module, nn.Linear)]
        for layer in chosen:
            if not isinstance(layer.module, nn.Linear) or layer.piece is not None:
                raise ValueError(
                    f"layers: {layer.name} is a {layer.kind}; only whole Linear layers "
                    "can be accelerated; name those alone, or exclude this one"
                )
        if not chosen:
            raise ValueError("layers: the model has no Linear to accelerate but its output head")
        return chosen

    def _settings(self) -> SemiSparse:
        m = self.modifier
        return SemiSparse(m.kind, m.rule, m.gradient, m.decay, m.refresh)

    def _named(self) -> list[Named]:
        return [(x.name, x.module) for x in self.layers if isinstance(x.module, nn.Linear)]

    def _to_the_end(self) -> bool:
        total = self.context.timeline.total
        return self.end is None or (total is not None and self.end >= total)

    def _sparse(self) -> list[tuple[Layer, SemiSparseLinear, Tensor]]:
        """(layer, its module, the mask) of those whose weights are masked at present."""
        return [
            (layer, layer.module, layer.module.tile_mask)
            for layer in self.layers
            if isinstance(layer.module, SemiSparseLinear) and layer.module.tile_mask is not None
        ]

    def on_attach(self) -> None:
        if self.begin == 0:
            self._swap(0)

    def _swap(self, step: int) -> None:
        swap_layers(self._named(), self.options)
        self.active, self.last = True, step

    @torch.no_grad()
    def before_update(self, step: int) -> None:
        if not self.active or self.modifier.gradient != "sr_ste":
            return
        decay = self.modifier.decay * gradient_scale(self.context.optimizer)
        for layer, _, mask in self._sparse():
            if layer.weight.grad is not None:
                layer.weight.grad.add_(torch.where(mask, 0, layer.weight), alpha=decay)

    def apply_masks(self, step: int) -> None:
        self.context.apply_masks(self)
        if self.active and self.end is not None and step >= self.end:
            self._end(step)

    def prune(self, step: int) -> None:
        if self.active:
            self._refresh(step)

    def begin_window(self, step: int) -> None:
        if not self.active and self.begin <= step and (self.end is None or step < self.end):
            self._swap(step)

    def _refresh(self, step: int) -> None:
        if not self.modifier.refresh or step - self.last < self.modifier.refresh:
            return
        sparse = self._sparse()
        for _, module, _ in sparse:
            module.choose_mask()
        self.last = step
        if sparse and step // self.period > self.recorded:
            self.recorded = step // self.period
            flips = {x.name: (m.flips, m.weight.numel()) for x, m, _ in sparse}
            self.context.record(flip_event(flips, step))

    def _end(self, step: int) -> None:
        held = [(x.local, self.context.masks.of(x)) for x in self.layers]
        for weight, pruned in held:
            if pruned is not None:  # another entry may not have put it on again yet
                zero_pruned([weight], [pruned])
        self._refresh(step)
        if self.modifier.keep:
            for layer, module, mask in self._sparse():
                pruned = self.context.masks.of(layer)
                mask = mask if pruned is None else mask & pruned
                self.context.mask(self, layer, mask)
                zero_pruned([module.weight.detach()], [mask])
        self.detach()

    @torch.no_grad()
    def finish(self, step: int) -> None:
        if self.active:
            self._end(step)

    def detach(self) -> None:
        if self.active:
            to_dense(self._named())
        self.active = False

    @property
    def span(self) -> tuple[float, float]:
        """Steps between which the layers are sparse while they compute."""
        return self.begin, inf if self.end is None else self.end

    def timetable(self) -> list[tuple[int, str]]:
        m = self.modifier
        what = f"2:4 {m.kind}s in {len(self.layers)} layers ({m.rule}, {m.gradient})"
        last = self.context.timeline.total if self.end is None else self.end
        after = "the last masks kept" if m.keep else "dense again"
        return [(self.begin, what)] + ([(last, after)] if last is not None else [])

    def state_dict(self) -> dict[str, Any]:
        masks = {layer.name: packed(mask) for layer, _, mask in self._sparse()}
        owned = [x.name for x in self.context.masks.owned(self, self.layers)]
        names = ("active", "last", "recorded")
        return {**{name: getattr(self, name) for name in names}, "masks": masks, "owned": owned}

    def check_state(self, state: dict[str, Any]) -> None:
        check_fields(state, active=bool, last=int, recorded=int, masks=dict, owned=list)
        check_tensors("masks", state["masks"], self.layers)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["active"] and not self.active:
            self._swap(int(state["last"]))
        elif not state["active"]:
            self.detach()
        self.last, self.recorded = int(state["last"]), int(state["recorded"])
        for layer, module, _ in self._sparse():
            mask = state["masks"][layer.name]
            module.give_mask(unpack(mask["bits"], mask["shape"]))
        self.context.masks.own(self, self.layers, state["owned"])


def flip_event(flips: dict[str, tuple[Tensor | None, int]], step: int) -> dict[str, Any]:
    """What records know of changing masks; ``flips`` is layer -> (share that changed, weights)."""
    rates = {name: (float(t), size) for name, (t, size) in flips.items() if t is not None}
    changed = sum(rate * size for rate, size in rates.values())
    return {
        "event": "flips",
        "step": step,
        "flip_rate": changed / max(1, sum(size for _, size in rates.values())),
        "layers": {name: rate for name, (rate, _) in rates.items()},
    }
