"""The shrunk model must compute what the model with masked units computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from prunus.channels.groups import Channels
from prunus.channels.inputs import random_like, run
from prunus.channels.recording import output_tensors, quiet
from prunus.channels.surgery import masks

# of the largest output: what another order of summation may differ by; in float64 too transformers
# has norms that compute in float32
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
HALF = 5e-2
SEEDS = (0, 1)


class _KeptStatistics(TorchFunctionMode):
    """LayerNorm and GroupNorm over the kept channels of a masked model alone."""

    def __init__(self, kept: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.layer_norm:
            return self._layer_norm(*args, **kwargs)
        if func is F.group_norm:
            return self._group_norm(*args, **kwargs)
        return func(*args, **kwargs)

    def _layer_norm(
        self, x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
    ) -> Tensor:
        keep = self.kept.get(id(weight))
        if keep is None or len(shape) != 1:
            return F.layer_norm(x, shape, weight, bias, eps)
        kept = F.layer_norm(
            x[..., keep],
            (int(keep.sum()),),
            weight[keep],
            None if bias is None else bias[keep],
            eps,
        )
        out = torch.zeros_like(x)
        out[..., keep] = kept
        return out

    def _group_norm(
        self, x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
    ) -> Tensor:
        keep = self.kept.get(id(weight))
        by_group = None if keep is None else keep.view(groups, -1)
        if keep is None or by_group is None or not bool((by_group.any(1)).all()):
            return F.group_norm(x, groups, weight, bias, eps)
        out = torch.zeros_like(x)
        out[:, keep] = F.group_norm(x[:, keep], groups, weight[keep], bias[keep], eps)
        return out


@contextlib.contextmanager
def masked(model: nn.Module, found: Channels, gone: Tensor) -> Iterator[None]:
    """The model with the units zero in all their tensors, as large as before; put back after."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    keep = masks(found, gone, model)
    saved = {name: tensors[name].data for name in keep}
    kept = {}
    for norm in found.trace.norms:
        weight = f"{norm.module}.weight"
        if norm.kind != "rms" and weight in keep:
            kept[id(tensors[weight])] = keep[weight]
    try:
        for name, mask in keep.items():
            tensors[name].data = saved[name] * mask
        with _KeptStatistics(kept):
            yield
    finally:
        for name, data in saved.items():
            tensors[name].data = data


def outputs(model: nn.Module, inputs: Sequence[Any]) -> list[list[Tensor]]:
    """Floating-point outputs for each of the inputs, in evaluation mode."""
    with quiet(model):
        return [
            [t.clone() for t in output_tensors(run(model, x)) if t.is_floating_point()]
            for x in inputs
        ]


def probes(example_inputs: Any) -> list[Any]:
    return [random_like(example_inputs, seed) for seed in SEEDS]


def difference(before: Sequence[Sequence[Tensor]], after: Sequence[Sequence[Tensor]]) -> str:
    """Why the outputs are not the same; empty if they are."""
    for one, other in zip(before, after, strict=True):
        if not one:
            return "the model has no output to compare"
        for a, b in zip(one, other, strict=True):
            if a.shape != b.shape:
                return f"an output of shape {tuple(a.shape)} has become {tuple(b.shape)}"
            error = relative_error(a, b)
            if not error <= TOLERANCE.get(a.dtype, HALF):
                return f"an output differs by {error:.1e} of its largest value"
    return ""


def relative_error(a: Tensor, b: Tensor) -> float:
    """The largest difference, of the largest value; where neither is finite, both must agree."""
    a, b = a.double(), b.double()
    there = a.isfinite()
    if not torch.equal(a[~there].nan_to_num(), b[~there].nan_to_num()) or not there.any():
        return float("inf") if there.any() else 0.0
    a, b = a[there], b[there]
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-12))
