"""Elementwise operations unite their operands position by position."""

from __future__ import annotations

from torch import Tensor
from torch.utils._pytree import tree_leaves

from prunus.channels.trace import (
    Operation,
    Trace,
    ZeroRule,
    all_zero,
    any_zero,
    handles,
    never_zero,
)

KEEP_ZERO = [
    "relu",
    "gelu",
    "silu",
    "tanh",
    "hardtanh",
    "hardswish",
    "leaky_relu",
    "elu",
    "mish",
    "neg",
    "abs",
    "erf",
    "sqrt",
    "sin",
    "sign",
    "prelu",
    "native_dropout",
    "dropout",
    "celu",
    "selu",
    "softshrink",
    "hardshrink",
    "_prelu_kernel",
    "square",
    "trunc",
    "round",
    "sinh",
    "asinh",
    "atan",
    "expm1",
    "log1p",
    "relu6",
    "positive",
]
LOSE_ZERO = [
    "sigmoid",
    "hardsigmoid",
    "softplus",
    "exp",
    "log",
    "log2",
    "cos",
    "rsqrt",
    "reciprocal",
    "log_sigmoid_forward",
    "pow",
    "threshold",
    "logical_not",
    "bitwise_not",
    "isnan",
    "isinf",
    "isfinite",
    "erfc",
    "floor",
    "ceil",
    "exp2",
]
PRODUCTS = ["mul"]
SUMS = [
    "add",
    "sub",
    "rsub",
    "lerp",
    "maximum",
    "minimum",
    "where",
    "copy",
    "clamp_min",
    "clamp_max",
    "clamp",
    "masked_fill",
]
OTHERS = [
    "ge",
    "gt",
    "le",
    "lt",
    "eq",
    "ne",
    "bitwise_and",
    "bitwise_or",
    "logical_and",
    "logical_or",
    "atan2",
    "fmod",
    "remainder",
]
LIKE = [
    "zeros_like",
    "ones_like",
    "full_like",
    "empty_like",
    "rand_like",
    "randn_like",
    "bernoulli",
    "zero",
    "fill",
]


def _elementwise(trace: Trace, op: Operation, rule: ZeroRule) -> None:
    out = op.first_out
    tensors = [t for t in tree_leaves((op.args, op.kwargs)) if isinstance(t, Tensor) and t.dim()]
    operands = [trace.labelled(t) for t in tensors]
    trace.put(out, trace.combine(operands, tuple(out.shape), rule, op.reason))


@handles(*KEEP_ZERO)
def unary(trace: Trace, op: Operation) -> None:
    _elementwise(trace, op, all_zero)


@handles(*LOSE_ZERO, *OTHERS)
def losing(trace: Trace, op: Operation) -> None:
    exponent = op.argument(1, "exponent")
    positive = op.name.startswith("pow") and isinstance(exponent, int | float) and exponent > 0
    _elementwise(trace, op, all_zero if positive else never_zero)


@handles(*PRODUCTS)
def product(trace: Trace, op: Operation) -> None:
    _elementwise(trace, op, any_zero)


@handles("div", "addcmul", "addcdiv")
def quotient(trace: Trace, op: Operation) -> None:
    _elementwise(
        trace, op, (lambda flags: bool(flags[0])) if op.name.rstrip("_") == "div" else all_zero
    )


@handles(*SUMS)
def addition(trace: Trace, op: Operation) -> None:
    shifted = any(isinstance(a, int | float) and a != 0 for a in op.args[1:])
    clamped = op.name.startswith("clamp") and op.argument(1, "min") in (0, 0.0, None)
    _elementwise(trace, op, never_zero if shifted and not clamped else all_zero)


@handles("copy_")
def copy(trace: Trace, op: Operation) -> None:
    target, source = op.args[:2]
    if (
        target not in trace.maps
        and target.numel() * target.element_size() < target.untyped_storage().nbytes()
    ):
        trace.freeze(trace.of(source), f"{op.reason} writes into a part of a tensor")
        return
    trace.put(
        target, trace.combine([trace.labelled(source)], tuple(target.shape), all_zero, op.reason)
    )


@handles(*LIKE)
def like(trace: Trace, op: Operation) -> None:
    _elementwise(trace, op, all_zero if op.name.startswith("zero") else never_zero)
