"""Does a module still compute the same? Rules know names and shapes; this knows the function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from prunus.permute.folds import Fold

# of the largest output: what another order of summation may differ by; in float64 too transformers
# has norms that compute in float32
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_HALF = 3e-2


def _outputs(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Floating-point tensors of one forward pass in eval mode, on copies of the inputs."""
    training = {m: m.training for m in module.modules()}
    args, kwargs = tree_map_only(Tensor, torch.clone, (args, dict(kwargs)))
    module.eval()
    try:
        with torch.no_grad():
            leaves = tree_leaves(module(*args, **kwargs))
    finally:
        for m, was in training.items():
            m.training = was
    return [t.clone() for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


def _differ(before: Tensor, after: Tensor) -> str:
    if before.shape != after.shape:
        return f"the output had shape {tuple(before.shape)} and has {tuple(after.shape)}"
    limit = _TOLERANCE.get(before.dtype, _HALF)
    a, b = before.double(), after.double()
    there = a.isfinite()
    if not torch.equal(a[~there].nan_to_num(), b[~there].nan_to_num()):
        return "what was not finite in the output has moved"
    if not there.any():
        return ""
    scale = float(a[there].abs().max())
    error = float((a - b)[there].abs().max())
    if error <= limit * scale:
        return ""
    return f"the output changed by {error:.1e}, of at most {scale:.1e}"


def _compare(before: list[Tensor], after: list[Tensor]) -> str:
    if not before or len(before) != len(after):
        return "there is no output to compare"
    return next(filter(None, map(_differ, before, after)), "")


def same_function(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    change: Callable[[], None],
    undo: Callable[[], None],
) -> str:
    """Why ``change()`` altered the function of `module`, and then it is undone; else empty.

    All tensors of the output are compared in eval mode, relative to the largest of each: to 1e-6
    in float64, 1e-4 in float32 and 3e-2 in half precision. The inputs must hold no cache, because
    values that are kept for later calls do move.
    """
    before = _outputs(module, args, kwargs)
    change()
    try:
        after = _outputs(module, args, kwargs)
    except BaseException:
        undo()
        raise
    reason = _compare(before, after)
    if reason:
        undo()
    return reason


def verify(
    fold: Fold, perms: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> str:
    """Apply a fold if its scope computes the same with it; else leave the weights, and say why.

    ``args`` and ``kwargs`` are inputs of ``fold.scope``, ``perms`` is (groups, width). Returns an
    empty text if the fold is applied.
    """
    apply, undo = (lambda: fold.apply(perms)), (lambda: fold.undo(perms))
    reason = same_function(fold.scope, args, kwargs or {}, apply, undo)
    return f"{fold.name}: {reason}; undone" if reason else ""
