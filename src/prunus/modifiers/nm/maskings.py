"""Maskings for N:M training: pruned weights live on, and may come back at any step.

The optimizer trains a dense weight ``w``; the network computes with ``(m + (1 - m) beta) w``, where
``m`` keeps the N highest of every M by magnitude, chosen anew after each step. Both are the same
tensor at different times, so that nothing is reparametrized: `apply` turns the one into the other
after a step, and before the next the dense weight is put back and `transform_gradients` makes its
gradient from that of the hidden one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prunus.core.masks import zero_pruned
from prunus.core.names import Registry, did_you_mean


@dataclass(frozen=True)
class Masking:
    """How pruned weights live on. Lists rather than tensors: one fused call serves a model."""

    name: ClassVar[str]

    def beta(self, t: int, total: int) -> float:
        """What pruned weights are multiplied by, ``t`` of ``total`` steps into the window."""
        return 0.0

    def apply(self, weights: list[Tensor], masks: list[Tensor], beta: float = 0.0) -> None:
        """Dense weights to hidden ones, in place: what the next forward pass sees."""
        scale(weights, masks, beta)

    def transform_gradients(
        self, grads: list[Tensor], weights: list[Tensor], masks: list[Tensor], beta: float, c: float
    ) -> None:
        """Gradients of the hidden weights to those of the dense ones, in place.

        ``c`` is what the gradients are multiplied by (GradScaler, under fused optimizers).
        """


@dataclass(frozen=True)
class STE(Masking):
    """Straight through: pruned weights get the gradient of the zero that stands in for them.

    Bengio, Leonard and Courville, "Estimating or Propagating Gradients Through Stochastic Neurons",
    2013, https://arxiv.org/abs/1308.3432.
    """

    name: ClassVar[str] = "ste"


@dataclass(frozen=True)
class SRSTE(Masking):
    """Straight through, and pruned weights decay: ``g + decay (1 - m) w``.

    Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch",
    ICLR 2021, https://arxiv.org/abs/2102.04010, eq. 9.
    """

    name: ClassVar[str] = "sr_ste"

    decay: float = 2e-4
    """lambda of the paper; beside the optimizer's own weight decay"""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < math.inf:
            raise ValueError(f"decay={self.decay} does not let pruned weights decay; use 0 or more")

    def transform_gradients(
        self, grads: list[Tensor], weights: list[Tensor], masks: list[Tensor], beta: float, c: float
    ) -> None:
        for g, w, mask in zip(grads, weights, masks, strict=True):
            # bytes, because casting from booleans (or `masked_fill`) is not vectorized on CPUs
            g.addcmul_(w, mask.logical_not().view(torch.uint8), value=self.decay * c)


DECAYS = ("linear", "exponential", "step", "cosine")
PUBLISHED_FALL = 11.0  # 1e-4 a step for 350 epochs of 313 steps


@dataclass(frozen=True)
class MDGF(Masking):
    """Mask decay: pruned weights fade, multiplied by a ``beta`` that falls from 1 to exactly 0.

    Bambhaniya et al., "Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers",
    2024, https://arxiv.org/abs/2402.04744; Kao et al., 2022, https://arxiv.org/abs/2209.07617.
    """

    name: ClassVar[str] = "mdgf"

    decay: str = "linear"
    """linear, exponential, step (by quarters) or cosine, over the window"""
    rate: float | None = None
    """c of `1 - c t` (linear) and `exp(-c t)` (exponential), where t counts steps; default: linear
    reaches 0 with the window's end, exponential `exp(-11)` just before it"""
    gradient: Literal["scaled", "ste"] = "scaled"
    """scaled: pruned weights get beta of their gradient, as the paper says; ste: all of it, as its
    code does"""
    eval: Literal["hard", "soft"] = "hard"
    """what the model shows in evaluation mode: pruned weights at zero, or times beta"""

    def __post_init__(self) -> None:
        if self.decay not in DECAYS:
            raise ValueError(f"unknown decay {self.decay!r}{did_you_mean(self.decay, DECAYS)}")
        if self.rate is not None and self.decay not in ("linear", "exponential"):
            raise ValueError(f"'rate' means nothing to decay {self.decay!r}; drop it")
        if self.rate is not None and not 0 < self.rate < math.inf:
            raise ValueError(f"rate={self.rate} is no rate of decay; use a number above 0")
        for name, values in (("gradient", ("scaled", "ste")), ("eval", ("hard", "soft"))):
            if (value := getattr(self, name)) not in values:
                raise ValueError(f"{name}={value!r}; use {values[0]!r} or {values[1]!r}")

    def beta(self, t: int, total: int) -> float:
        p = t / max(1, total)
        if p >= 1:
            return 0.0
        if self.decay == "linear":
            return max(0.0, 1 - (p if self.rate is None else self.rate * t))
        if self.decay == "exponential":
            return math.exp(-PUBLISHED_FALL * p if self.rate is None else -self.rate * t)
        if self.decay == "cosine":
            return (1 + math.cos(math.pi * p)) / 2
        return 1 - math.floor(4 * p) / 4

    def transform_gradients(
        self, grads: list[Tensor], weights: list[Tensor], masks: list[Tensor], beta: float, c: float
    ) -> None:
        if self.gradient == "scaled":
            scale(grads, masks, beta)


def scale(tensors: list[Tensor], masks: list[Tensor], beta: float) -> None:
    """``t (m + (1 - m) beta)``, in place."""
    if beta == 0:
        zero_pruned(tensors, masks)
        return
    for t, mask in zip(tensors if beta != 1 else [], masks, strict=False):
        t.mul_(mask.view(torch.uint8).to(t.dtype).clamp_(min=beta))


MASKINGS: Registry[Masking] = Registry("masking")
for _masking in (STE, SRSTE, MDGF):
    MASKINGS.add(_masking.name, _masking)
