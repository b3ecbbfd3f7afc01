"""Products with a 2:4 operand on the sparse tensor cores, by the kernels of core torch.

Operands arrive masked. Packing them is left to the kernel's greedy rule by magnitude: what is not
zero comes first and fits, because the mask is legal, so only zeros compete for slots left over and
the product is that of the masked matrix, kept zeros included.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

# as torch.compiler.disable, which would import the whole tracer already with the package
from torch._compile import _disable_dynamo
from torch.nn.functional import pad
from torch.sparse import (
    SparseSemiStructuredTensor,
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
)

MULTIPLE = 64  # both sides of a sparse operand: what a warp of CUTLASS's kernel packs
MULTIPLE_CUSPARSELT = 128
DENSE_MULTIPLE = 8  # the free side of the dense operand
HALVES = (torch.float16, torch.bfloat16)


def compute_dtype(t: Tensor) -> torch.dtype:
    """What a linear layer computes in with this operand; autocast leaves fp64 alone."""
    kind = t.device.type
    cast = torch.is_autocast_enabled(kind) and t.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if cast else t.dtype


def available(x: Tensor, w: Tensor) -> bool:
    """Whether a layer with this input and weight can compute on sparse tensor cores."""
    if not x.is_cuda or not x.numel() or torch.version.hip is not None:
        return False
    halves = compute_dtype(x) == compute_dtype(w) and compute_dtype(w) in HALVES
    return halves and torch.cuda.get_device_capability(x.device) >= (8, 0)


def pack(t: Tensor) -> SparseSemiStructuredTensor:
    """The masked matrix, its sides multiples of `MULTIPLE`, packed along both of them."""
    sides = all(side % MULTIPLE_CUSPARSELT == 0 for side in t.shape)
    cls: Any = SparseSemiStructuredTensorCUTLASS
    if sides and torch.backends.cusparselt.is_available():
        cls = SparseSemiStructuredTensorCUSPARSELT
    with warnings.catch_warnings():  # of a prototype, once
        warnings.simplefilter("ignore", UserWarning)
        packed: SparseSemiStructuredTensor = cls.prune_dense_static_sort(
            t.contiguous(), algorithm="largest_abs_values_greedy"
        )
    return packed


class _SparseWeight(torch.autograd.Function):
    """``x @ w.T``: x (n, in), w (out, in) sparse; the gradient of ``w`` is a dense product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.packed = pack(w)
        ctx.save_for_backward(x)
        return torch.mm(x, ctx.packed.t())

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (x,), g = ctx.saved_tensors, g.contiguous()
        into = torch.mm(g, ctx.packed) if ctx.needs_input_grad[0] else None
        return into, torch.mm(g.t(), x) if ctx.needs_input_grad[1] else None


class _SparseInput(torch.autograd.Function):
    """The same with x sparse; the gradient of ``x`` is a dense product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.packed = pack(x)
        ctx.save_for_backward(w)
        return torch.mm(ctx.packed, w.t())

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (w,), g = ctx.saved_tensors, g.contiguous()
        into = torch.mm(g, w) if ctx.needs_input_grad[0] else None
        return into, torch.mm(ctx.packed.t(), g).t() if ctx.needs_input_grad[1] else None


# autograd functions on packed tensors are beyond the tracer
@_disable_dynamo
def sparse_weight_linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear` with a masked weight; x is (..., in), w (out, in)."""
    dtype = compute_dtype(w)
    flat = x.to(dtype).reshape(-1, x.shape[-1])
    y = _SparseWeight.apply(flat, w.to(dtype))
    return _finish(y, x, bias)


@_disable_dynamo
def sparse_input_linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear` with a masked input; x is (n, in), w (out, in)."""
    dtype = compute_dtype(w)
    y = _SparseInput.apply(x.to(dtype), w.to(dtype))
    return _finish(y, x, bias)


def _finish(y: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    y = y.reshape(*x.shape[:-1], y.shape[-1])
    return y if bias is None else y + bias.to(y.dtype)


def pad_rows(x: Tensor, multiple: int) -> Tensor:
    """(n, cols) with rows of zeros appended up to a multiple."""
    missing = -len(x) % multiple
    return pad(x, (0, 0, 0, missing)) if missing else x
