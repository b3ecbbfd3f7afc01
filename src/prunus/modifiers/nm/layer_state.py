"""One layer in N:M training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prunus.core.layers import Layer
from prunus.core.masks import packed, unpack, zero_pruned
from prunus.core.sharding import gather, scatter
from prunus.engine.method import LayerResult
from prunus.modifiers.events import counted
from prunus.modifiers.nm.maskings import Masking
from prunus.modifiers.nm.stages import Groups


class NMLayerState:
    """A layer, its patterns in turn, and its dense weight while that is hidden.

    Between steps the parameter is the hidden weight that the network computes with, and ``dense``
    the one that the optimizer trains.
    ``shown`` is the beta of what is in the parameter, None while that is the dense weight;
    ``alive`` is what had not been pruned when training to N:M began, None if that is all.
    """

    def __init__(self, layer: Layer, patterns: list[Groups]) -> None:
        self.layer, self.patterns = layer, patterns
        self.dense: Tensor | None = None
        self.alive: Tensor | None = None
        self.shown: float | None = None
        self._shown_version: tuple[int, int] | None = None
        self._foreign_version: tuple[int, int] | None = None

    def choose(self, progress: float) -> Tensor:
        """The keep-mask of the moment, from the magnitudes of the dense weight in the model."""
        w, layer = self.layer.local, self.layer
        pattern = self.patterns[min(int(progress * len(self.patterns)), len(self.patterns) - 1)]
        scores = w.abs() if self.alive is None else torch.where(self.alive, w.abs(), -1)
        mask = layer.unmatrix(pattern.mask(layer.matrix(scores), 0), tuple(w.shape))
        return mask if self.alive is None else mask & self.alive

    def zero_pruned(self) -> None:
        """What was pruned before is zero again in the dense weight, which is in the model."""
        if self.alive is not None:
            zero_pruned([self.layer.local], [self.alive])

    def mark(self, shown: float) -> None:
        """The parameter is the hidden weight of this beta; from here on `known` watches it."""
        self.shown, self._shown_version = shown, self._version

    @property
    def _version(self) -> tuple[int, int]:
        """Which parameter, and how often it has been written."""
        return id(self.layer.weight), self.layer.local._version

    @property
    def is_unwritten(self) -> bool:
        """Whether nothing has been written to the parameter since a hidden weight was."""
        return self._version == self._shown_version

    def is_unmodified(self, masking: Masking, mask: Tensor, beta: float) -> bool:
        """Whether the parameter holds a hidden weight, and not what others wrote.

        Writing the same again, as swapping in averaged weights and back does, is no difference,
        be it the one of ``beta`` or the hard one that evaluation shows; `shown` then tells which.
        """
        version = self._version
        if version in (self._shown_version, self._foreign_version):
            return version == self._shown_version
        assert self.dense is not None
        for shown in {beta, 0.0}:
            hidden = self.dense.clone()
            masking.apply([hidden], [mask], shown)
            if torch.equal(hidden, self.layer.local):
                self.mark(shown)
                return True
        self._foreign_version = version
        return False

    def row(self, mask: Tensor) -> LayerResult:
        return counted(self.layer, str(self.patterns[-1]), mask)

    def state_dict(self) -> dict[str, Any]:
        """Dense weight and what is alive, whole on every rank; empty outside the window."""
        state: dict[str, Any] = {}
        if self.dense is not None:
            state["dense"] = self._whole(self.dense).detach().clone()
        if self.alive is not None:
            state["alive"] = packed(self._whole(self.alive))
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.dense = self.alive = None
        if "dense" in state:
            self.dense = self._part(state["dense"]).to(self.layer.local, copy=True)
        if "alive" in state:
            alive = self._part(unpack(state["alive"]["bits"], state["alive"]["shape"]))
            self.alive = alive.to(self.layer.local.device)

    def _whole(self, t: Tensor) -> Tensor:
        return gather(t, self.layer.weight) if self.layer.piece is None else t

    def _part(self, t: Tensor) -> Tensor:
        return scatter(t, self.layer.weight) if self.layer.piece is None else t
