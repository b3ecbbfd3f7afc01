"""Operations that only move elements: the same operation moves the labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prunus.channels.attributes import head_counts
from prunus.channels.labels import Labelled, LabelMap, compact, mapped
from prunus.channels.trace import Operation, Part, Split, Trace, all_zero, handles

aten = torch.ops.aten
SAME = (
    "clone alias detach contiguous _to_copy lift_fresh lift lift_fresh_copy positive resolve_conj"
)
VIEWS = "view _unsafe_view reshape _reshape_alias"
MOVES = (
    "permute transpose t squeeze unsqueeze roll flip pixel_shuffle pixel_unshuffle movedim repeat "
    "channel_shuffle numpy_T native_channel_shuffle diagonal unfold"
)


@handles(*SAME.split())
def same(trace: Trace, op: Operation) -> None:
    trace.put(op.out, trace.of(op.args[0]))


@handles("as_strided", "as_strided_")
def restrided(trace: Trace, op: Operation) -> None:
    """Only where the shape stays, as after pooling in channels-last order."""
    x, size = op.args[:2]
    if (
        tuple(op.out.shape) == tuple(size)
        and x.numel() == op.out.numel()
        and x.dim() == op.out.dim()
    ):
        trace.put(op.out, trace.of(x))
    else:
        trace.freeze(trace.of(x), op.reason)


@handles(*MOVES.split())
def moved(trace: Trace, op: Operation) -> None:
    x = op.args[0]
    maps = trace.of(x)
    trace.put(
        op.out, mapped(x.shape, maps, lambda ids: op.func(ids, *op.args[1:], **op.kwargs)).maps
    )


@handles(*VIEWS.split())
def viewed(trace: Trace, op: Operation) -> None:
    x, out = op.args[0], op.out
    results = []
    for m in trace.of(x):
        ids = compact(m.ids.expand(x.shape).reshape(out.shape))
        if sum(s > 1 for s in ids.shape) > len(m.axes):
            trace.splits.append(Split(ids, trace.where))
        results.append(replace(m, ids=ids))
    trace.put(out, results)


@handles("expand")
def expanded(trace: Trace, op: Operation) -> None:
    """Copies along an axis of as many heads as the module says it has are removable with them."""
    x, out = op.args[0], op.out
    maps = list(mapped(x.shape, trace.of(x), lambda ids: ids.expand(out.shape)).maps)
    trace.put(out, maps + _copies(trace, x, out))


def _copies(trace: Trace, x: Tensor, out: Tensor) -> list[LabelMap]:
    counts = head_counts(trace.module) if trace.stack else {}
    more = out.dim() - x.dim()
    found = []
    for d in range(out.dim()):
        before = x.shape[d - more] if d >= more else 1
        if before == 1 and out.shape[d] > 1 and out.shape[d] in counts.values():
            ids = trace.coupling.new(out.shape[d])
            found.append(LabelMap(ids.view([-1 if i == d else 1 for i in range(out.dim())]), False))
    return found


@handles("select", "unbind")
def selected(trace: Trace, op: Operation) -> None:
    """One position of an axis is named in the code, so none of that axis can go."""
    x = op.args[0]
    dim = op.argument(1, "dim", 0) % x.dim()
    maps = trace.fixed(trace.of(x), [dim], f"{op.reason} names positions")
    maps = [replace(m, ids=m.ids.squeeze(dim)) for m in maps]
    for out in op.out if isinstance(op.out, list | tuple) else [op.out]:
        trace.put(out, maps)


@handles("slice")
def sliced(trace: Trace, op: Operation) -> None:
    x, out = op.args[0], op.out
    dim = op.argument(1, "dim", 0) % x.dim()
    size, part = x.shape[dim], out.shape[dim]
    maps = trace.of(x)
    if part != size:
        start = op.argument(2, "start") or 0
        start = max(0, start + size) if start < 0 else start
        even = op.argument(4, "step", 1) == 1 and part and size % part == 0 and start % part == 0
        maps = _equal_parts(trace, op, maps, dim, part if even else 0)
    trace.put(out, maps)


def _equal_parts(
    trace: Trace, op: Operation, maps: Sequence[LabelMap], dim: int, part: int
) -> list[LabelMap]:
    """Equal parts of an axis lose the same positions; an axis cut unequally loses none."""
    results: list[LabelMap] = []
    for m in maps:
        if not m.along(dim):
            results.append(m)
        elif part > 1:
            folded = m.ids.reshape(*m.ids.shape[:dim], -1, part, *m.ids.shape[dim + 1 :])
            first = folded.narrow(dim, 0, 1)
            trace.coupling.unite(first, folded, op.reason)
            ids = compact(first.squeeze(dim))
            trace.parts.append(Part(ids.flatten(), trace.where))
            results.append(replace(m, ids=ids))
        else:
            results += trace.fixed([m], [dim], f"{op.reason} cuts at fixed positions")
    return results


@handles("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_split_with_sizes")
def split(trace: Trace, op: Operation) -> None:
    x, dim = op.args[0], op.argument(2, "dim", 0) % op.args[0].dim()
    sizes = {part.shape[dim] for part in op.out}
    part = sizes.pop() if len(sizes) == 1 and len(op.out) > 1 else 0
    maps: Sequence[LabelMap] = trace.of(x)
    if len(op.out) > 1:
        maps = _equal_parts(trace, op, maps, dim, part)
    for out in op.out:
        trace.put(out, maps)


def concatenated(trace: Trace, parts: Sequence[Labelled], dim: int, reason: str) -> list[LabelMap]:
    """Labels of what is put together along `dim`; across it the parts are united."""
    dims = len(parts[0].shape)
    across = [replace(p, maps=[m for m in p.maps if not m.along(dim)]) for p in parts]
    shape = tuple(1 if d == dim else parts[0].shape[d] for d in range(dims))
    results = trace.combine(
        [
            replace(p, shape=tuple(1 if d == dim else s for d, s in enumerate(p.shape)))
            for p in across
        ],
        shape,
        all_zero,
        reason,
    )
    along = [[m for m in p.maps if m.along(dim)] for p in parts]
    if any(along):
        # only the axes that vary: the others have been compared already
        axes = {d for m in results for d in m.axes}
        narrow = tuple(s if d in axes else 1 for d, s in enumerate(shape))
        whole = tuple(
            sum(p.shape[dim] for p in parts) if d == dim else s for d, s in enumerate(shape)
        )
        operands = [Labelled(narrow, results), _joined(parts, along, dim)]
        results = trace.combine(operands, whole, all_zero, reason)
    return results


def _joined(parts: Sequence[Labelled], along: Sequence[Sequence[LabelMap]], dim: int) -> Labelled:
    """One map along `dim`; positions of parts without labels are 0."""
    axes = {d for maps in along for m in maps for d in m.axes} - {dim}
    pieces = []
    for part, maps in zip(parts, along, strict=True):
        shape = [s if d == dim or d in axes else 1 for d, s in enumerate(part.shape)]
        ids = maps[0].ids if maps else torch.zeros((), dtype=torch.int32)
        pieces.append(ids.expand(shape))
    ids = torch.cat(pieces, dim)
    zero = all(m.zero for maps in along for m in maps)
    shape_out = [
        sum(p.shape[dim] for p in parts) if d == dim else s for d, s in enumerate(parts[0].shape)
    ]
    shape_out = [s if d == dim or d in axes else 1 for d, s in enumerate(shape_out)]
    return Labelled(tuple(shape_out), [LabelMap(compact(ids), zero)])


@handles("cat", "concat")
def cat(trace: Trace, op: Operation) -> None:
    parts = [trace.labelled(t) for t in op.args[0] if t.dim() == op.out.dim()]
    dim = op.argument(1, "dim", 0) % op.out.dim()
    trace.put(op.out, concatenated(trace, parts, dim, op.reason))


@handles("stack")
def stacked(trace: Trace, op: Operation) -> None:
    dim = op.argument(1, "dim", 0) % op.out.dim()
    parts = []
    for t in op.args[0]:
        maps = [replace(m, ids=m.ids.unsqueeze(dim)) for m in trace.of(t)]
        parts.append(Labelled(tuple(t.unsqueeze(dim).shape), maps))
    trace.put(op.out, concatenated(trace, parts, dim, op.reason))


@handles("constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad2d")
def padded(trace: Trace, op: Operation) -> None:
    """Zeros along a removable axis are positions that stay; elsewhere padding moves nothing."""
    x, pads = op.args[0], list(op.args[1])
    touched = [x.dim() - 1 - i // 2 for i in range(0, len(pads), 2) if pads[i] or pads[i + 1]]
    results = []
    for m in trace.of(x):
        own = list(pads)
        for i in range(0, len(pads), 2):
            if not m.along(x.dim() - 1 - i // 2):
                own[i] = own[i + 1] = 0
        varies = any(m.along(d) for d in touched)
        ids = aten.constant_pad_nd(m.ids, own, 0) if varies else m.ids
        results.append(LabelMap(ids, m.zero and not (op.argument(2, "value", 0) or 0)))
    trace.put(op.out, results)


@handles("index", "index_select")
def indexed(trace: Trace, op: Operation) -> None:
    """The axes that are looked up keep their length; the others go through."""
    x = op.args[0]
    if op.name == "index":
        dims = [d for d, i in enumerate(op.args[1]) if i is not None]
        if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in op.args[1]):
            trace.freeze(trace.of(x), f"{op.reason} by a mask")
            return
    else:
        dims = [op.args[1] % x.dim()]
    maps = trace.fixed(trace.of(x), dims, f"{op.reason} looks positions up")
    rest: tuple[Any, ...] = op.args[1:]
    trace.put(op.out, mapped(x.shape, maps, lambda ids: op.func(ids, *rest, **op.kwargs)).maps)


@handles("index_add")
def index_added(trace: Trace, op: Operation) -> None:
    """Rows are added to rows; across them both are united."""
    target, dim, _, source = op.args[:4]
    maps = trace.fixed(trace.of(source), [dim % source.dim()], op.reason)
    shape = tuple(1 if d == dim % source.dim() else s for d, s in enumerate(source.shape))
    operands = [trace.labelled(target), Labelled(shape, maps)]
    trace.put(op.out, trace.combine(operands, tuple(target.shape), all_zero, op.reason))


@handles("embedding")
def embedding(trace: Trace, op: Operation) -> None:
    weight, index = op.args[:2]
    maps = trace.fixed(trace.of(weight), [0], f"{op.reason} looks positions up")
    shape = (1,) * index.dim() + (-1,)
    trace.put(op.out, [replace(m, ids=m.ids.reshape(shape)) for m in maps])


@handles("im2col")
def patches(trace: Trace, op: Operation) -> None:
    x = op.args[0]
    fixed = trace.fixed(trace.of(x), [0, *range(2, x.dim())], op.reason)
    kernel = op.args[1][0] * op.args[1][1]
    results = []
    for m in fixed:
        ids = m.ids.reshape(-1).repeat_interleave(kernel)
        results.append(replace(m, ids=ids.view(1, -1, 1)))
    trace.put(op.out, results)
