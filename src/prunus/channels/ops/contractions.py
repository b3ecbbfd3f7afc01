"""Matrix products, attention and convolutions: the contracted axes unite, the free ones pass.

Each also leaves its cost in multiply-accumulates, as a product over labels and fixed sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prunus.channels.labels import Labelled, LabelMap, Shape
from prunus.channels.trace import Cost, Operation, Trace, all_zero, any_zero, handles


def _cost(
    trace: Trace, shape: Shape, maps: Sequence[LabelMap], inner: int, k: Tensor | None
) -> None:
    """``prod(shape) * inner`` products; labelled axes count what is kept of them."""
    labelled = {d for m in maps for d in m.axes}
    constant = math.prod(s for d, s in enumerate(shape) if d not in labelled)
    factors = [m.ids.flatten() for m in maps]
    if k is not None:
        factors.append(k.flatten())
    else:
        constant *= inner
    trace.costs.append(Cost(constant, factors, trace.where))


def _one(maps: Sequence[LabelMap], dim: int) -> LabelMap | None:
    return next((m for m in maps if m.along(dim)), None)


def contract(trace: Trace, a: Labelled, b: Labelled, reason: str) -> tuple[Shape, list[LabelMap]]:
    """Shape and maps of ``a @ b``: (..., n, k) by (..., k, m), with equal numbers of axes.

    Where what is contracted also varies along a batch axis, that axis is one of heads: within a
    head nothing is removed, and the product is labelled by head.
    """
    dims = len(a.shape)
    k, n, m = dims - 1, dims - 2, dims - 1
    a_maps = _free_of(trace, a.maps, k, n, reason)
    b_maps = _free_of(trace, b.maps, dims - 2, m, reason)
    inner_a, inner_b = _one(a_maps, k), _one(b_maps, dims - 2)
    factor = None
    if any(d < n for i in (inner_a, inner_b) if i for d in i.axes):
        why = f"{reason} contracts within heads"
        a_maps, b_maps = trace.fixed(a_maps, [k], why), trace.fixed(b_maps, [dims - 2], why)
    elif inner_a and inner_b:
        ids_a, ids_b = inner_a.ids.flatten(), inner_b.ids.flatten()
        trace.coupling.unite(ids_a, ids_b, reason)
        if not (inner_a.zero or inner_b.zero):
            trace.freeze([inner_a], f"{reason} contracts what is not zero when it is masked")
        a_maps, b_maps = _but(a_maps, inner_a), _but(b_maps, inner_b)
        factor = ids_a
    else:
        why = f"{reason} contracts it with a tensor of fixed size"
        a_maps, b_maps = trace.fixed(a_maps, [k], why), trace.fixed(b_maps, [dims - 2], why)
    a_maps = _whole_heads(trace, a_maps, b_maps, n, reason)
    b_maps = _whole_heads(trace, b_maps, a_maps, n, reason)
    batched = [i.ids for i in (*a_maps, *b_maps) if any(d < n for d in i.axes)]
    _note_heads(trace, [ids.narrow(n, 0, 1).narrow(m, 0, 1) for ids in batched])
    left = Labelled((*a.shape[:-1], 1), a_maps)
    right = Labelled((*b.shape[:-2], 1, b.shape[-1]), b_maps)
    shape = (*a.shape[:-1], b.shape[-1])
    maps = trace.combine([left, right], shape, any_zero, reason)
    _cost(trace, shape, maps, a.shape[-1], factor)
    return shape, maps


def _whole_heads(
    trace: Trace, maps: Sequence[LabelMap], others: Sequence[LabelMap], n: int, reason: str
) -> list[LabelMap]:
    """What varies over heads and within them, where the other factor's heads are fixed, stays.

    Else each head would lose the same positions, and code says how large a head is.
    """
    labelled = {d for m in others for d in m.axes}
    results = []
    for m in maps:
        batch = [d for d in m.axes if d < n]
        if batch and len(m.axes) > len(batch) and not labelled & set(batch):
            trace.freeze([m], f"{reason} has heads of fixed number")
        else:
            results.append(m)
    return results


def _note_heads(trace: Trace, heads: Sequence[Tensor]) -> None:
    """Labels of what is batched over; where one side has fewer than the other, heads share it."""
    trace.heads += heads
    if len({torch.unique(ids).numel() for ids in heads}) > 1:
        trace.shared_heads += heads


def _but(maps: Sequence[LabelMap], one: LabelMap) -> list[LabelMap]:
    return [m for m in maps if m is not one]


def _free_of(
    trace: Trace, maps: Sequence[LabelMap], inner: int, outer: int, reason: str
) -> list[LabelMap]:
    """What varies along both axes of a matrix is fixed along the free one."""
    both = [m for m in maps if m.along(inner) and m.along(outer)]
    return [*trace.fixed(both, [outer], reason), *(m for m in maps if m not in both)]


@handles("mm", "bmm", "matmul")
def product(trace: Trace, op: Operation) -> None:
    a, b = map(trace.labelled, op.args[:2])
    trace.put(op.out, contract(trace, a, b, op.reason)[1])


@handles("addmm", "baddbmm")
def biased_product(trace: Trace, op: Operation) -> None:
    bias, a, b = map(trace.labelled, op.args[:3])
    shape, maps = contract(trace, a, b, op.reason)
    trace.put(op.out, trace.combine([Labelled(shape, maps), bias], shape, all_zero, op.reason))


@handles("linear")
def linear(trace: Trace, op: Operation) -> None:
    x, w = map(trace.labelled, op.args[:2])
    maps = [replace(m, ids=m.ids.t()) for m in w.maps]
    flat = (1,) * (len(x.shape) - 2)
    turned = Labelled(w.shape[::-1], maps).aligned(len(flat) + 2)
    shape, results = contract(trace, x, turned, op.reason)
    if (bias := op.argument(2, "bias")) is not None:
        operands = [Labelled(shape, results), trace.labelled(bias)]
        results = trace.combine(operands, shape, all_zero, op.reason)
    trace.put(op.out, results)


@handles("mv", "dot", "vdot")
def vector_product(trace: Trace, op: Operation) -> None:
    a, b = map(trace.labelled, op.args[:2])
    if len(a.shape) == 1:
        a = a.aligned(2)
    column = [replace(m, ids=m.ids.unsqueeze(-1)) for m in b.maps]
    _, maps = contract(trace, a, Labelled((*b.shape, 1), column), op.reason)
    trace.put(op.out, [replace(m, ids=m.ids.squeeze(-1)) for m in maps] if op.out.dim() else [])


@handles(
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math",
    "_scaled_dot_product_attention_math_for_mps",
    "scaled_dot_product_attention",
)
def attention(trace: Trace, op: Operation) -> None:
    """Query heads of one key/value head are united with it."""
    q, k, v = (trace.labelled(t) for t in op.args[:3])
    heads = q.shape[1]
    k, v = _repeated(trace, k, heads), _repeated(trace, v, heads)
    if op.kwargs.get("scale") is None and heads == 1:
        # the scale follows from the width of the only head
        q, k = (replace(t, maps=trace.fixed(t.maps, [3], op.reason)) for t in (q, k))
    turned = Labelled(
        (*k.shape[:-2], k.shape[-1], k.shape[-2]),
        [replace(m, ids=m.ids.transpose(-1, -2)) for m in k.maps],
    )
    shape, scores = contract(trace, q, turned, op.reason)
    mask = next(
        (t for t in (op.kwargs.get("attn_mask"), *op.args[3:]) if isinstance(t, Tensor)), None
    )
    if mask is not None:
        operands = [Labelled(shape, scores), trace.labelled(mask)]
        scores = trace.combine(operands, shape, all_zero, op.reason)
    scores = trace.fixed(scores, [len(shape) - 1], f"softmax of {op.reason}")
    scores = [replace(m, zero=False) for m in scores]
    trace.put(op.first_out, contract(trace, Labelled(shape, scores), v, op.reason)[1])


def _repeated(trace: Trace, x: Labelled, heads: int) -> Labelled:
    """Keys or values with one copy for each query head."""
    copies = heads // x.shape[1]
    if copies == 1:
        return x
    maps = [replace(m, ids=m.ids.repeat_interleave(copies, 1)) if m.along(1) else m for m in x.maps]
    return Labelled((x.shape[0], heads, *x.shape[2:]), maps)


@handles("convolution", "_convolution")
def convolution(trace: Trace, op: Operation) -> None:
    x, weight, bias, *_ = op.args
    transposed, groups = op.args[6], op.args[8]
    channels = _channels(trace, trace.labelled(x), op.reason)
    w = trace.labelled(weight)
    w_maps = trace.fixed(w.maps, range(2, len(w.shape)), op.reason)
    first, second = _one(w_maps, 0), _one(w_maps, 1)
    kernel = math.prod(w.shape[2:])
    if groups == 1:
        writer, reader = (second, first) if transposed else (first, second)
        out, factor = _dense(trace, channels, writer, reader, op.reason)
    else:
        out, factor = _grouped(trace, op, channels, first, second)
    shape = tuple(op.out.shape)
    spatial = (1,) * (len(shape) - 2)
    maps = [] if out is None else [LabelMap(out.ids.reshape(1, -1, *spatial), out.zero)]
    inner = (w.shape[0] // groups if transposed else w.shape[1]) * kernel
    positions = x.shape[2:].numel() if transposed else math.prod(shape[2:])
    counted = (shape[0], shape[1], positions) + ((kernel,) if factor is not None else ())
    counted_maps = (
        [] if out is None else [LabelMap(out.ids.reshape(1, -1, *(1,) * (len(counted) - 2)))]
    )
    _cost(trace, counted, counted_maps, inner, factor)
    if bias is not None:
        b = trace.labelled(bias)
        b = Labelled(
            (1, *b.shape, *spatial),
            [replace(m, ids=m.ids.reshape(1, -1, *spatial)) for m in b.maps],
        )
        maps = trace.combine([Labelled(shape, maps), b], shape, all_zero, op.reason)
    trace.put(op.out, maps)


def _channels(trace: Trace, x: Labelled, reason: str) -> LabelMap | None:
    """Labels of the input's channels; along all other axes nothing goes."""
    others = [0, *range(2, len(x.shape))]
    return _one(trace.fixed(x.maps, others, reason), 1)


def _dense(
    trace: Trace, x: LabelMap | None, writer: LabelMap | None, reader: LabelMap | None, reason: str
) -> tuple[LabelMap | None, Tensor | None]:
    """Labels of the output's channels, and those of the inputs that are summed over."""
    if x is not None and reader is not None:
        trace.coupling.unite(x.ids.flatten(), reader.ids.flatten(), reason)
        if not (x.zero or reader.zero):
            trace.freeze([x], f"{reason} contracts what is not zero when it is masked")
        return writer, reader.ids
    lone = [m for m in (x, reader) if m is not None]
    trace.freeze(lone, f"{reason} reads a tensor of fixed size")
    return writer, None


def _grouped(
    trace: Trace, op: Operation, x: LabelMap | None, first: LabelMap | None, second: LabelMap | None
) -> tuple[LabelMap | None, Tensor | None]:
    """Whole groups go, or equal positions of every group, whichever leaves the finer choice."""
    tensor, groups, transposed = op.args[0], op.args[8], op.args[6]
    within = tensor.shape[1] // groups
    outs = op.out.shape[1] // groups
    whole = within < groups or outs < 2
    trace.modes[trace.where] = "whole" if whole else "within"
    # transposed weights are (groups * within, outs), others (groups * outs, within)
    long, short = (x_like(first), x_like(second))
    if whole:
        trace.freeze([m for m in (second,) if m], f"{op.reason} keeps the width of its groups")
        return _whole_groups(trace, op, x, long, groups, (within, outs), transposed), None
    if x is not None:
        _tie(trace, x.ids.view(groups, within), op.reason)
    if long is not None:
        _tie(trace, long.view(groups, -1), op.reason)
    reads, writes = (long, short) if transposed else (short, long)
    if x is not None and reads is not None:
        trace.coupling.unite(x.ids.flatten()[:within], reads.flatten()[:within], op.reason)
    else:
        lone = [i for i in (None if x is None else x.ids, reads) if i is not None]
        trace.freeze([LabelMap(i) for i in lone], f"{op.reason} reads a tensor of fixed size")
        reads = None
    if writes is not None and transposed:
        writes = writes.repeat(groups)
    out = None if writes is None else LabelMap(writes)
    return out, None if reads is None else reads.flatten()[:within]


def x_like(m: LabelMap | None) -> Tensor | None:
    return None if m is None else m.ids.flatten()


def _tie(trace: Trace, ids: Tensor, reason: str) -> None:
    trace.coupling.unite(ids[:1], ids, reason)


def _whole_groups(
    trace: Trace,
    op: Operation,
    x: LabelMap | None,
    long: Tensor | None,
    groups: int,
    sizes: tuple[int, int],
    transposed: bool,
) -> LabelMap | None:
    if x is None or long is None:
        lone = [i for i in (None if x is None else x.ids, long) if i is not None]
        trace.freeze([LabelMap(i) for i in lone], f"{op.reason} has groups of fixed number")
        return None
    of_x, of_w = x.ids.view(groups, -1), long.view(groups, -1)
    for ids in (of_x, of_w):
        trace.coupling.unite(ids[:, :1], ids, op.reason)
    trace.coupling.unite(of_x[:, :1], of_w[:, :1], op.reason)
    return LabelMap(of_w[:, :1].expand(groups, sizes[1]).reshape(-1) if transposed else long)
