"""Normalizations: BatchNorm is exact by channel; the others know the width they normalize over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from prunus.channels.labels import Labelled, LabelMap
from prunus.channels.trace import Norm, Operation, Trace, all_zero, any_zero, handles


def _by_channel(trace: Trace, t: Tensor | None, dims: int) -> Labelled | None:
    if t is None:
        return None
    spatial = (1,) * (dims - 2)
    maps = [replace(m, ids=m.ids.reshape(1, -1, *spatial)) for m in trace.of(t)]
    return Labelled((1, t.shape[0], *spatial), maps)


def _channelwise(trace: Trace, op: Operation, x: Tensor, affine: Sequence[Tensor | None]) -> None:
    found = [_by_channel(trace, t, x.dim()) for t in affine]
    operands = [Labelled(tuple(x.shape), trace.of(x)), *(o for o in found if o)]
    weight, bias = found[0], found[1]
    # x times the weight is zero where either is, and the bias must be as well
    rule = any_zero if weight is not None else all_zero
    if weight is None and bias is not None:
        rule = all_zero
    trace.put(op.first_out, trace.combine(operands, tuple(x.shape), rule, op.reason))


@handles(
    "native_batch_norm",
    "cudnn_batch_norm",
    "miopen_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "_batch_norm_no_update",
    "batch_norm",
)
def batch_norm(trace: Trace, op: Operation) -> None:
    x, weight, bias = op.args[:3]
    running = [t for t in op.args[3:5] if isinstance(t, Tensor)]
    if not running:  # statistics of this very tensor, as in a standardized weight
        others = [0, *range(2, x.dim())]
        moving = [m for m in trace.of(x) if any(map(m.along, others))]
        trace.freeze(moving, f"{op.reason} takes statistics over a removable axis")
        trace.put(x, [m for m in trace.of(x) if m not in moving])
    _channelwise(trace, op, x, [weight, bias, *running])


@handles("native_layer_norm", "layer_norm")
def layer_norm(trace: Trace, op: Operation) -> None:
    x, shape, weight, bias = op.args[:4]
    _normalized_over(trace, op, x, range(x.dim() - len(shape), x.dim()), "layer", [weight, bias])


@handles("_fused_rms_norm", "rms_norm")
def rms_norm(trace: Trace, op: Operation) -> None:
    x, shape, weight = op.args[:3]
    _normalized_over(trace, op, x, range(x.dim() - len(shape), x.dim()), "rms", [weight])


def _normalized_over(
    trace: Trace,
    op: Operation,
    x: Tensor,
    dims: Sequence[int],
    kind: str,
    affine: Sequence[Tensor | None],
) -> None:
    """A width that is one with other axes (heads) stays; a width of its own is noted."""
    maps: list[LabelMap] = []
    for m in trace.of(x):
        if not any(map(m.along, dims)):
            maps.append(m)
        elif set(m.axes) - set(dims):
            maps += trace.fixed([m], dims, f"{op.reason} normalizes within heads")
        elif affine[0] is None:
            trace.freeze([m], f"{op.reason} has no weight that could say which channels are left")
        else:
            trace.norms.append(Norm(m.ids.flatten(), trace.where, kind))
            maps.append(m)
    operands = [Labelled(tuple(x.shape), maps)]
    operands += [trace.labelled(t) for t in affine if t is not None]
    trace.put(op.first_out, trace.combine(operands, tuple(x.shape), any_zero, op.reason))


@handles("native_group_norm", "group_norm")
def group_norm(trace: Trace, op: Operation) -> None:
    """Whole groups go, or equal positions of every group, whichever leaves the finer choice."""
    x, weight, bias = op.args[:3]
    groups = op.args[6] if op.name == "native_group_norm" else op.args[1]
    channels = trace.fixed(trace.of(x), [0, *range(2, x.dim())], op.reason)
    whole = x.shape[1] // groups < groups
    trace.modes[trace.where] = "whole" if whole else "within"
    for m in channels:
        ids = m.ids.reshape(groups, -1)
        trace.coupling.unite(ids[:, :1] if whole else ids[:1], ids, op.reason)
        if not whole:
            trace.norms.append(Norm(m.ids.flatten(), trace.where, "group"))
            if weight is None:
                trace.freeze([m], f"{op.reason} has no weight")
    trace.put(x, channels)
    _channelwise(trace, op, x, [weight, bias])
