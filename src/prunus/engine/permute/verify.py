"""Does a module still compute the same? Rules know names and shapes; this knows the function."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from prunus.core.layers import Layer
from prunus.core.snapshots import Snapshots
from prunus.engine.permute.folds import AppliedFold, Fold, Slot

# of the largest output: what another order of summation may differ by; in float64 too transformers
# has norms that compute in float32
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_HALF = 3e-2
# of the norm of what one layer puts out, where no large residual stream hides a difference; more,
# because in deep networks rounding grows from layer to layer
_OF_NORM = {torch.float64: 1e-5, torch.float32: 1e-3}
_HALF_OF_NORM = 1e-1
# entries of a layer's output that are compared
_SAMPLE = 1 << 18

Inputs = Mapping[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]]
Outputs = tuple[list[Tensor], dict[str, list[Tensor]]]


def _sampled(tensor: Tensor) -> Tensor:
    """Evenly spaced entries, by a step that visits all channels; a copy."""
    return tensor.detach().flatten()[:: tensor.numel() // _SAMPLE | 1].clone()


@contextlib.contextmanager
def _watched(readers: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """Samples of what the modules put out, by their names, in the order of the calls."""
    seen: dict[str, list[Tensor]] = {name: [] for name in readers}

    def hook(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            seen[name].append(_sampled(output))

    with contextlib.ExitStack() as stack:
        for name, module in readers.items():
            handle = module.register_forward_hook(functools.partial(hook, name))
            stack.callback(handle.remove)
        yield seen


def _outputs(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    readers: Mapping[str, nn.Module],
) -> Outputs:
    """Floating-point tensors of one forward pass in eval mode, on copies of the inputs."""
    training = {m: m.training for m in module.modules()}
    args, kwargs = tree_map_only(Tensor, torch.clone, (args, dict(kwargs)))
    module.eval()
    try:
        with torch.no_grad(), _watched(readers) as seen:
            leaves = tree_leaves(module(*args, **kwargs))
    finally:
        for m, was in training.items():
            m.training = was
    return [t.clone() for t in leaves if isinstance(t, Tensor) and t.is_floating_point()], seen


def _difference(before: Tensor, after: Tensor, what: str, order: float, limit: float) -> str:
    """Why two tensors differ by more than ``limit`` of a norm of this order; else empty."""
    if before.shape != after.shape:
        return f"{what} had shape {tuple(before.shape)} and has {tuple(after.shape)}"
    a, b = before.double(), after.double()
    there = a.isfinite()
    if not torch.equal(a[~there].nan_to_num(), b[~there].nan_to_num()):
        return f"what was not finite in {what} has moved"
    if not there.any():
        return ""
    scale = float(torch.linalg.vector_norm(a[there], order))
    error = float(torch.linalg.vector_norm((a - b)[there], order))
    if error <= limit * scale:
        return ""
    of = "at most" if order == math.inf else "a norm of"
    return f"{what} changed by {error:.1e}, of {of} {scale:.1e}"


def _largest_differ(before: Tensor, after: Tensor) -> str:
    limit = _TOLERANCE.get(before.dtype, _HALF)
    return _difference(before, after, "the output", math.inf, limit)


def _norms_differ(name: str, before: list[Tensor], after: list[Tensor]) -> str:
    if len(before) != len(after):
        return f"{name} was called {len(before)} times and is called {len(after)} times"
    for a, b in zip(before, after, strict=True):
        limit = _OF_NORM.get(a.dtype, _HALF_OF_NORM)
        if reason := _difference(a, b, f"the output of {name}", 2, limit):
            return reason
    return ""


def _compare(before: Outputs, after: Outputs) -> str:
    (a, norms_before), (b, norms_after) = before, after
    if not a or len(a) != len(b):
        return "there is no output to compare"
    reasons = [*map(_largest_differ, a, b)]
    reasons += [_norms_differ(name, norms_before[name], norms_after[name]) for name in norms_before]
    return next(filter(None, reasons), "")


def same_function(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    change: Callable[[], None],
    undo: Callable[[], None],
    readers: Mapping[str, nn.Module] | None = None,
) -> str:
    """Why ``change()`` altered the function of `module`, and then it is undone; else empty.

    All tensors of the output are compared in eval mode, relative to the largest of each: to 1e-6
    in float64, 1e-4 in float32 and 3e-2 in half precision. So is what each of ``readers`` within
    it, by their names, puts out when it is called, relative to its norm: to 1e-5, 1e-3 and 1e-1.
    The inputs must hold no cache, because values that are kept for later calls do move. ``undo()``
    must take back what ``change()`` has done, be it all, a part or nothing.
    """
    before = _outputs(module, args, kwargs, readers or {})
    try:
        change()
        after = _outputs(module, args, kwargs, readers or {})
        reason = _compare(before, after)
    except BaseException:
        undo()
        raise
    if reason:
        undo()
    return reason


def _watchable(fold: Fold) -> dict[str, nn.Module]:
    """The readers whose outputs stay as they are: not those that also write what moves.

    What stands in attention's own weights is not called; there the scope has to tell.
    """
    writers = {slot.module for r in fold.readers for slot in fold.slots if _writes(slot, r)}
    readers = {reader.name: reader.module for reader in fold.readers}
    return {
        name: module
        for name, module in readers.items()
        if module not in writers and not isinstance(module, nn.MultiheadAttention)
    }


def _writes(slot: Slot, reader: Layer) -> bool:
    return slot.module is reader.module and slot.dim == reader.rows_dim


def take(taken: AppliedFold, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> str:
    """`verify`, for who holds on to what is taken in order to take it back."""
    fold = taken.fold
    changes = taken.apply, taken.undo
    reason = same_function(fold.scope, args, kwargs or {}, *changes, _watchable(fold))
    return f"{fold.name}: {reason}; undone" if reason else ""


def verify(
    fold: Fold, perms: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> str:
    """Apply a fold if its scope computes the same with it; else leave the weights, and say why.

    ``args`` and ``kwargs`` are inputs of ``fold.scope``, ``perms`` is (groups, width). Returns an
    empty text if the fold is applied. Raises ValueError if ``perms`` does not fit the fold.
    """
    return take(AppliedFold(fold, fold.checked(perms)), args, kwargs)


@contextlib.contextmanager
def first_calls(modules: Iterable[nn.Module]) -> Iterator[Inputs]:
    """What each of the modules is given when it is called for the first time, as it is then.

    A module that is not called has no entry.
    """
    keep = Snapshots()
    found: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module not in found:
            found[module] = keep((args, kwargs))

    with contextlib.ExitStack() as stack:
        for module in set(modules):
            handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield found
