"""What a forward pass asks of each layer: multiplications, those that count, and its inputs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunus.core.layers import CONVS, Layer, all_layers
from prunus.formats import Mask

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass
class Activity:
    """Of one layer, summed over its calls."""

    calls: int = 0
    macs: int = 0
    """multiplications of the dense layer"""
    effective_macs: int = 0
    """those of a nonzero weight and a nonzero activation"""
    inputs: int = 0
    zeros: int = 0
    vectors: int = 0
    """matrix-vector products: a linear layer's samples or tokens, a convolution's output places"""
    samples: list[Mask] = field(default_factory=list)
    """(some vectors, columns) which of their inputs are not zero, evenly picked"""

    @property
    def input_sparsity(self) -> float:
        """Share of the layer's input activations that are exactly zero."""
        return self.zeros / max(1, self.inputs)


@torch.no_grad()
def measure_activity(model: nn.Module, example_inputs: Any, vectors: int) -> dict[str, Activity]:
    """Layer name -> what one forward pass does there; layers that it did not call are missing.

    The model runs in evaluation mode, and is put back into the modes it was in. ``vectors`` is how
    many input vectors of each call are kept.
    """
    layers = {id(x.module): x for x in all_layers(model) if x.is_module}
    result: dict[str, Activity] = {}

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        layer = layers[id(module)]
        if args and hasattr(module, "input_matrix"):
            _add_sparse(result.setdefault(layer.name, Activity()), layer, args[0], output, vectors)
        elif args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            _add(result.setdefault(layer.name, Activity()), layer, args[0], output, vectors)

    with contextlib.ExitStack() as stack:
        for layer in layers.values():
            stack.callback(layer.module.register_forward_hook(hook).remove)
        with _evaluation(model):
            forward(model, example_inputs)
    return result


def forward(model: nn.Module, example_inputs: Any) -> Any:
    """A tensor is the only argument, a tuple or list all of them, a mapping those by keyword."""
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, tuple | list):
        return model(*example_inputs)
    return model(example_inputs)


@contextlib.contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _add(activity: Activity, layer: Layer, x: Tensor, y: Tensor, vectors: int) -> None:
    there = x != 0
    activity.calls += 1
    activity.inputs += x.numel()
    activity.zeros += x.numel() - int(there.sum())
    rows, cols = layer.matrix_shape()
    if isinstance(layer.module, _TRANSPOSED):
        activity.macs += x.numel() * layer.local[0].numel()
        activity.effective_macs += _transposed_macs(layer, there)
        return
    products = y.numel() // max(1, rows)
    activity.macs += products * rows * cols
    activity.vectors += products
    convolution = isinstance(layer.module, CONVS)
    count = _convolution_macs if convolution else _linear_macs
    activity.effective_macs += count(layer, there)
    if layer.reads_arguments and not layer.no_inputs():
        # unfolding the whole batch would take as much memory as a copy for each kernel position
        some = x[: max(1, vectors)] if convolution and x.dim() > layer.local.dim() - 1 else x
        matrix = layer.input_matrix(some)
        picked = torch.linspace(0, len(matrix) - 1, min(vectors, len(matrix))).long()
        activity.samples.append((matrix[picked.to(matrix.device)] != 0).cpu().numpy())


def _add_sparse(activity: Activity, layer: Layer, x: Any, y: Any, vectors: int) -> None:
    """A sparse convolution; the dense layer is the one over the whole grid."""
    rows, cols = layer.matrix_shape()
    matrix = layer.input_matrix(x) != 0
    inputs = x.batch_size * math.prod(x.spatial_shape) * x.features.shape[1]
    activity.calls += 1
    activity.inputs += inputs
    activity.zeros += inputs - int((x.features != 0).sum())
    activity.macs += y.batch_size * math.prod(y.spatial_shape) * rows * cols
    activity.effective_macs += _linear_macs(layer, matrix)
    activity.vectors += len(matrix)
    picked = torch.linspace(0, len(matrix) - 1, min(vectors, len(matrix))).long()
    activity.samples.append(matrix[picked.to(matrix.device)].cpu().numpy())


def _linear_macs(layer: Layer, there: Tensor) -> int:
    weights = layer.matrix(layer.local != 0).sum(0)
    return int((there.reshape(-1, there.shape[-1]).sum(0) * weights).sum())


def _convolution_macs(layer: Layer, there: Tensor) -> int:
    """The convolution of ones where inputs are, with how many outputs have a weight there."""
    conv: Any = layer.module
    kernel = layer.local
    per_group = (kernel != 0).reshape(conv.groups, -1, *kernel.shape[1:]).sum(1).double()
    ones = there.double()
    padding = conv.padding
    if conv.padding_mode != "zeros":
        ones = F.pad(ones, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
        padding = 0
    dims = kernel.dim() - 2
    convolve: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    counts = convolve(ones, per_group, None, conv.stride, padding, conv.dilation, conv.groups)
    return round(float(counts.sum()))


def _transposed_macs(layer: Layer, there: Tensor) -> int:
    """Each input meets all weights of its channel; what falls outside the output counts too."""
    places = layer.local.dim() - 2
    channels = there.reshape(-1, layer.local.shape[0], *there.shape[-places:])
    per_channel = channels.transpose(0, 1).flatten(1).sum(1)
    return int((per_channel * (layer.local != 0).flatten(1).sum(1)).sum())


def stack_samples(activity: Activity) -> Mask:
    """(vectors, columns) of all calls."""
    return np.concatenate(activity.samples)


def unreached(model: nn.Module, activity: Mapping[str, Activity]) -> list[str]:
    """Prunable layers that the pass did not call as modules, such as attention's own weights."""
    return [layer.name for layer in all_layers(model) if layer.name not in activity]
