"""The gradient past a mask: straight through (Bengio et al., 2013), with decay, or masked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    """``t * mask`` forward; backward ``g``, plus ``decay * (1 - mask) * t`` unless decay is 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(t: Tensor, mask: Tensor, decay: float) -> Tensor:
        return torch.where(mask, t, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        t, mask, ctx.decay = inputs
        if ctx.decay:
            ctx.save_for_backward(t, mask)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        if ctx.decay:
            t, mask = ctx.saved_tensors
            g = g.add(torch.where(mask, 0, t), alpha=ctx.decay)
        return g, None, None


def masked(t: Tensor, mask: Tensor, gradient: str, decay: float) -> Tensor:
    """``t * mask``, of the shape of both, with the gradient of `SemiSparse.gradient`.

    ``sr_ste``: Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From
    Scratch", 2021 (https://arxiv.org/abs/2102.04010), eq. 6.
    """
    if gradient == "masked":
        return torch.where(mask, t, 0)
    result: Tensor = _StraightThrough.apply(t, mask, decay if gradient == "sr_ste" else 0.0)
    return result
