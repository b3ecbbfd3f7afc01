"""Sums, means, softmax and pooling: a removable axis that is reduced stays, or is exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from prunus.channels.attributes import is_rms_norm
from prunus.channels.labels import LabelMap
from prunus.channels.trace import Norm, Operation, Trace, handles

POOLS = (
    "avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d "
    "adaptive_avg_pool1d adaptive_max_pool2d max_pool1d max_pool2d_with_indices "
    "max_pool3d_with_indices max_pool2d upsample_nearest1d upsample_nearest2d upsample_bilinear2d "
    "upsample_bicubic2d _upsample_bicubic2d_aa _upsample_bilinear2d_aa upsample_linear1d "
    "_upsample_nearest_exact2d"
)


def _dims(op: Operation, position: int) -> list[int]:
    x = op.args[0]
    dim = op.argument(position, "dim")
    if dim is None or isinstance(dim, bool) or dim == []:
        return list(range(x.dim()))
    return sorted(d % x.dim() for d in ([dim] if isinstance(dim, int) else dim))


def _reduced(trace: Trace, op: Operation, dims: Sequence[int], exact: bool) -> None:
    """``exact``: zeros do not change the result, so a masked axis may be summed over."""
    x, results = op.args[0], []
    for m in trace.of(x):
        if not any(map(m.along, dims)):
            results.append(m)
        elif set(m.axes) - set(dims):
            results += trace.fixed([m], dims, op.reason)
        elif trace.stack and is_rms_norm(trace.module):
            trace.norms.append(Norm(m.ids.flatten(), trace.where, "rms"))
        elif not (exact and m.zero):
            trace.freeze([m], f"{op.reason} reduces over it")
    out = op.first_out
    for t in op.out if isinstance(op.out, tuple | list) else [out]:
        trace.put(t, [_squeezed(m, dims, t.dim()) for m in results])


def _squeezed(m: LabelMap, dims: Sequence[int], left: int) -> LabelMap:
    if m.ids.dim() == left:
        return m
    return replace(m, ids=m.ids.squeeze(tuple(dims)))


@handles("sum")
def total(trace: Trace, op: Operation) -> None:
    _reduced(trace, op, _dims(op, 1), exact=True)


@handles(
    "mean",
    "amax",
    "amin",
    "var",
    "std",
    "var_mean",
    "max",
    "min",
    "logsumexp",
    "prod",
    "any",
    "all",
)
def reduced(trace: Trace, op: Operation) -> None:
    _reduced(trace, op, _dims(op, 1), exact=False)


@handles("linalg_vector_norm", "norm")
def norm(trace: Trace, op: Operation) -> None:
    _reduced(trace, op, _dims(op, 2), exact=True)


@handles("_softmax", "_log_softmax", "_safe_softmax", "cumsum", "softmax")
def along(trace: Trace, op: Operation) -> None:
    """Each position depends on all the others of the axis."""
    x, dim = op.args[0], op.args[1] % op.args[0].dim()
    maps = trace.fixed(trace.of(x), [dim], op.reason)
    trace.put(op.out, [replace(m, zero=False) for m in maps])


@handles(*POOLS.split())
def pooled(trace: Trace, op: Operation) -> None:
    x, spatial = op.args[0], {"1": 1, "2": 2, "3": 3}
    count = next((n for digit, n in spatial.items() if f"{digit}d" in op.name), 2)
    dims = range(x.dim() - count, x.dim())
    maps = trace.fixed(trace.of(x), dims, op.reason)
    for out in op.out if isinstance(op.out, tuple) else [op.out]:
        trace.put(out, maps)
