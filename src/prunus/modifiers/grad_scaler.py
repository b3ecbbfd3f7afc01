"""What GradScaler leaves on a fused optimizer, which it calls even for steps that are skipped."""

from __future__ import annotations

import torch


def step_is_skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer has been called for a step that it must skip."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)


def gradient_scale(optimizer: torch.optim.Optimizer) -> float:
    """What the gradients are multiplied by inside the step."""
    scale = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else float(scale)
