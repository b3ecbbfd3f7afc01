"""The layers of an entry in N:M training: dense weights hidden and put back, all at once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from prunus.core.masks import local
from prunus.modifiers.base import Context
from prunus.modifiers.nm.layer_state import NMLayerState
from prunus.modifiers.nm.maskings import Masking
from prunus.modifiers.state_checks import check_tensors

PARTS = ("dense", "alive")


class NMState:
    """Lists rather than single tensors, so that one fused call serves a whole model.

    ``beta`` is that of the last step, ``showing`` that of all parameters by now, None where they
    differ or hold something else. With ``resumed`` the parameters may hold what was loaded
    after the dense weights, which then counts for nothing.
    """

    def __init__(self, layers: list[NMLayerState], masking: Masking, context: Context) -> None:
        self.layers, self.masking, self.context = layers, masking, context
        self.beta, self.resumed = 1.0, False
        self.remembered = False
        self.showing: float | None = None

    def __iter__(self) -> Iterator[NMLayerState]:
        return iter(self.layers)

    @property
    def begun(self) -> bool:
        """Whether there are dense weights beside those in the parameters."""
        return self.layers[0].dense is not None

    @property
    def hidden(self) -> bool:
        """Whether the parameters hold the hidden weights, as they do between steps."""
        return self.layers[0].shown is not None

    def remember_pruned(self) -> None:
        """When the window begins: what is pruned by now stays pruned.

        Once: if choosing masks raises, these may be in the registry when it is tried again.
        """
        if self.remembered:
            return
        for t in self.layers:
            alive = self.context.masks.of(t.layer)
            # of a third, because other thirds may be what the mask is for
            if alive is not None and not (t.layer.piece is not None and bool(alive.all())):
                t.alive = alive.clone()
        self.remembered = True

    def masks(self, layers: list[NMLayerState]) -> list[Tensor]:
        found = (self.context.masks.of(t.layer) for t in layers)
        return [mask for mask in found if mask is not None]

    def hide_dense(self, beta: float) -> None:
        """The dense weights, which are in the parameters, to hidden ones of a new beta."""
        for t in self.layers:
            if t.dense is None:
                t.dense = torch.empty_like(t.layer.local)
        torch._foreach_copy_(_dense(self.layers), _weights(self.layers))
        self.beta = beta
        self.apply(beta)

    def apply(self, beta: float, layers: list[NMLayerState] | None = None) -> None:
        """The same, where ``dense`` has them already."""
        if layers is None:
            layers, self.showing = self.layers, beta
        self.masking.apply(_weights(layers), self.masks(layers), beta)
        for t in layers:
            t.mark(beta)

    def show(self, beta: float, layers: list[NMLayerState]) -> None:
        """Other hidden weights in place of those in the parameters."""
        torch._foreach_copy_(_weights(layers), _dense(layers))
        self.apply(beta, layers)
        torch.clear_autocast_cache()  # else the rest of an autocast region computes with the old

    def is_unmodified(self) -> list[bool]:
        """For each layer whether its parameter holds nothing but what was put there."""
        pairs = zip(self.layers, self.masks(self.layers), strict=True)
        return [t.is_unmodified(self.masking, mask, self.beta) for t, mask in pairs]

    def not_showing(self, beta: float) -> list[NMLayerState]:
        """Layers that are to be shown with this beta and are not.

        What others wrote is theirs until the next step, but a resumed model's own state is not.
        """
        if self.showing == beta and not self.resumed:
            return []
        unmodified = self.is_unmodified()
        self.showing = beta if all(unmodified) else None
        pairs = zip(self.layers, unmodified, strict=True)
        return [t for t, known in pairs if (t.shown != beta if known else self.resumed)]

    def put_back(self, same_values: bool = True) -> int:
        """The dense weights into the parameters; how many layers keep what others have written.

        With `same_values`, having written the same again is no difference. A state that was loaded
        is one however much it is like the present one.
        """
        if self.resumed:
            known = [True] * len(self.layers)
        elif same_values:
            known = self.is_unmodified()
        else:
            known = [t.is_unwritten for t in self.layers]
        kept = list(itertools.compress(self.layers, known))
        self.showing, self.resumed = None, False
        if kept:
            torch._foreach_copy_(_weights(kept), _dense(kept))
        for t in self.layers:
            t.shown = None
        return len(self.layers) - len(kept)

    def transform_gradients(self, c: float) -> None:
        """Gradients of the hidden weights to those of the dense ones; ``c`` is their scale."""
        pairs = zip(self.layers, self.masks(self.layers), strict=True)
        grads, weights, masks = [], [], []
        for t, mask in pairs:
            if t.layer.weight.grad is not None:
                grads.append(t.layer.part(local(t.layer.weight.grad)))
                weights.append(t.layer.local)
                masks.append(mask)
        if grads:
            self.masking.transform_gradients(grads, weights, masks, self.beta, c)

    def state_dict(self) -> dict[str, Any]:
        states = {t.layer.name: t.state_dict() for t in self.layers}
        parts = {key: {n: s[key] for n, s in states.items() if key in s} for key in PARTS}
        return {"beta": self.beta, **parts}

    def check_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError for what is not of these layers; changes nothing."""
        layers = [t.layer for t in self.layers]
        for key in PARTS:
            parts = state.get(key, {})
            if not isinstance(parts, dict):
                raise ValueError(f"{key}={parts!r} is no dict")
            check_tensors(key, parts, layers)
        lacking = [x.name for x in layers if x.name not in state.get("dense", {})]
        if 0 < len(lacking) < len(layers):
            raise ValueError(f"dense lacks {lacking[0]!r}")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.beta = float(state["beta"])
        self.remembered = False
        for t in self.layers:
            parts = {key: state.get(key, {}).get(t.layer.name) for key in PARTS}
            t.load_state_dict({key: part for key, part in parts.items() if part is not None})
        if self.begun:
            self.show(self.beta, self.layers)
            self.resumed = True  # the model's own state may be loaded after this


def _weights(layers: list[NMLayerState]) -> list[Tensor]:
    return [t.layer.local for t in layers]


def _dense(layers: list[NMLayerState]) -> list[Tensor]:
    return [t.dense for t in layers if t.dense is not None]
