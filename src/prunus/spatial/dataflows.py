"""Ways to run a sparse convolution over a kernel map; all of them give the same sums.

Each takes features (N, Ci), weights (K, Ci, Co) and a map, and returns (outputs, Co). Features of
16 bits are added up in 32. They are run by `convolve`, without a record for autograd.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prunus.spatial.grouping import plan_groups
from prunus.spatial.maps import KernelMap

Dataflow = Callable[[Tensor, Tensor, KernelMap], Tensor]
_CHUNK_ENTRIES = 1 << 18
"""entries of the gathered inputs that are multiplied at a time, so that they stay in the cache"""


def _sums(x: Tensor, w: Tensor, kernel_map: KernelMap) -> Tensor:
    """The outputs with the centre's products, in the precision in which sums are formed."""
    dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    if kernel_map.centre is None:
        return x.new_zeros(kernel_map.outputs, w.shape[2], dtype=dtype)
    return (x @ w[kernel_map.centre]).to(dtype)


def gather_scatter(x: Tensor, w: Tensor, kernel_map: KernelMap) -> Tensor:
    """Offset by offset: gather the inputs, multiply, add to the outputs."""
    out = _sums(x, w, kernel_map)
    for i, (source, target) in enumerate(kernel_map.pairs):
        if len(source):
            out.index_add_(0, target, (x.index_select(0, source) @ w[i]).to(out.dtype))
    return out.to(x.dtype)


def fused(x: Tensor, w: Tensor, kernel_map: KernelMap) -> Tensor:
    """One gather for all offsets, a product for each, and one scatter."""
    out = _sums(x, w, kernel_map)
    gathered = x.index_select(0, kernel_map.source)
    products = x.new_empty(len(gathered), w.shape[2])
    begin = 0
    for i, size in enumerate(kernel_map.sizes):
        if size:
            rows = slice(begin, begin + size)
            torch.mm(gathered[rows], w[i], out=products[rows])
        begin += size
    out.index_add_(0, kernel_map.target, products.to(out.dtype))
    return out.to(x.dtype)


def implicit(x: Tensor, w: Tensor, kernel_map: KernelMap) -> Tensor:
    """Output by output, as one product with all offsets' inputs side by side (implicit GEMM).

    Nothing is scattered, so the order of sums is fixed on a GPU too.
    """
    offsets, channels, outputs = w.shape
    table = kernel_map.table()
    padded = torch.cat([x, x.new_zeros(1, channels)])
    flat = w.reshape(offsets * channels, outputs)
    rows = max(1, _CHUNK_ENTRIES // max(1, offsets * channels))
    out = x.new_empty(len(table), outputs)
    gathered = x.new_empty(min(rows, len(table)) * offsets, channels)
    for begin in range(0, len(table), rows):
        part = table[begin : begin + rows].reshape(-1)
        torch.index_select(padded, 0, part, out=gathered[: len(part)])
        side_by_side = gathered[: len(part)].view(-1, offsets * channels)
        torch.mm(side_by_side, flat, out=out[begin : begin + rows])
    return out


def grouped(
    x: Tensor, w: Tensor, kernel_map: KernelMap, epsilon: float = 0.3, threshold: int = 20_000
) -> Tensor:
    """Offsets of about the same size are padded to one batched product; see `grouping`."""
    out = _sums(x, w, kernel_map)
    pairs = kernel_map.pairs
    for group in plan_groups(kernel_map.sizes, epsilon, threshold):
        if not group.batched:
            for i in group.offsets:
                source, target = pairs[i]
                out.index_add_(0, target, (x.index_select(0, source) @ w[i]).to(out.dtype))
            continue
        gathered = x.new_zeros(len(group.offsets), group.size, x.shape[1])
        for rows, i in zip(gathered, group.offsets, strict=True):
            rows[: len(pairs[i][0])] = x.index_select(0, pairs[i][0])
        products = torch.bmm(gathered, w[list(group.offsets)]).to(out.dtype)
        for rows, i in zip(products, group.offsets, strict=True):
            out.index_add_(0, pairs[i][1], rows[: len(pairs[i][1])])
    return out.to(x.dtype)


DATAFLOWS: dict[str, Dataflow] = {
    "gather_scatter": gather_scatter,
    "fused": fused,
    "implicit": implicit,
    "grouped": grouped,
}


class _SparseConvolution(torch.autograd.Function):
    """Forward by a dataflow; the gradient of the inputs by the same one, over the mirrored map.

    Neither gathered inputs nor products are kept for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        w: Tensor,
        kernel_map: KernelMap,
        dataflow: Dataflow,
    ) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.kernel_map, ctx.dataflow = kernel_map, dataflow  # type: ignore[attr-defined]
        return dataflow(x, w, kernel_map)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, w = ctx.saved_tensors
        grad = grad.contiguous()
        to_x = to_w = None
        if ctx.needs_input_grad[0]:
            to_x = ctx.dataflow(grad, w.transpose(1, 2).contiguous(), ctx.kernel_map.transposed())
        if ctx.needs_input_grad[1]:
            to_w = _weight_gradient(x, grad, w, ctx.kernel_map)
        return to_x, to_w, None, None


def _weight_gradient(x: Tensor, grad: Tensor, w: Tensor, kernel_map: KernelMap) -> Tensor:
    result = torch.zeros_like(w)
    if kernel_map.centre is not None:
        result[kernel_map.centre] = x.T @ grad
    for i, (source, target) in enumerate(kernel_map.pairs):
        if len(source):
            result[i] = x.index_select(0, source).T @ grad.index_select(0, target)
    return result


def convolve(x: Tensor, w: Tensor, kernel_map: KernelMap, dataflow: Dataflow) -> Tensor:
    """``out[o] = sum over pairs (i, o) of each offset k of x[i] @ w[k]``, differentiable once."""
    result: Tensor = _SparseConvolution.apply(x, w, kernel_map, dataflow)
    return result
