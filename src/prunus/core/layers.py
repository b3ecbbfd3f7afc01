"""Layers: the one place that knows Linear, convolutions, attention and transformers' Conv1D apart.

A `Layer` is one weight that can be pruned, seen as a matrix (outputs, inputs * kernel positions).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from prunus.core.masks import local
from prunus.core.shared_memory import places

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def clean_name(name: str) -> str:
    """The name, in an `unwrap`ped model, without what wrappers inside it put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def is_sharded(t: Tensor) -> bool:
    """Whether ranks hold parts of it (FSDP2's DTensors)."""
    return hasattr(t, "to_local")


def reshard(model: nn.Module) -> None:
    """Drop the gathered copies that FSDP2 keeps after a forward pass without a backward.

    Else a module shows the copy in place of its parameter, and computes with it whatever is
    written to the parameter.
    """
    for module in model.modules():
        # by name, because the import takes long and has moved between versions of torch
        if any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__):
            module.reshard()  # type: ignore[operator]


def clean_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by clean name, tied ones under each of their names."""
    reshard(model)
    named = unwrap(model).named_parameters(remove_duplicate=False)
    return {clean_name(name): p for name, p in named}


def _class_name(module: nn.Module) -> str:
    # fully_shard turns a Linear into an FSDPLinear
    return type(module).__name__.removeprefix("FSDP")


def _is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D: a linear layer whose weight is stored as (inputs, outputs)."""
    weight = getattr(module, "weight", None)
    named = _class_name(module) == "Conv1D" and hasattr(module, "nf")
    return named and isinstance(weight, Tensor) and weight.dim() == 2


@dataclass(frozen=True, eq=False)
class Layer:
    """One prunable weight.

    ``name`` is the clean module name (for attention's own weights the parameter's name),
    ``parameter_name`` the clean name in ``named_parameters()``. With ``channels_inner`` the matrix
    runs over kernel positions first and input channels last, so that groups of columns are groups
    of input channels; without, columns are in the order of ``weight.flatten(1)``. With ``qkv_part``
    only that third of the rows is meant: 0, 1, 2 for q, k, v in a fused weight.

    >>> conv = nn.Conv2d(3, 8, kernel_size=2)
    >>> layer = prunus.Layer("stem", "stem.weight", conv, conv.weight)
    >>> layer.kind, layer.shape, layer.matrix_shape()
    ('Conv2d', (8, 3, 2, 2), (8, 12))
    """

    name: str
    parameter_name: str
    module: nn.Module
    weight: nn.Parameter
    channels_inner: bool = False
    qkv_part: int | None = None

    @property
    def kind(self) -> str:
        return _class_name(self.module)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole weight (or third), on however many ranks it lies."""
        shape = list(self.weight.shape)
        if self.qkv_part is not None:
            shape[self.rows_dim] //= 3
        return tuple(shape)

    @property
    def local(self) -> Tensor:
        """This rank's part of the weight, detached, sharing its memory."""
        return self.part(local(self.weight.detach()))

    def part(self, t: Tensor) -> Tensor:
        """The layer's third of a tensor of its parameter's local shape; a view."""
        if self.qkv_part is None:
            return t
        size = t.shape[self.rows_dim] // 3
        return t.narrow(self.rows_dim, self.qkv_part * size, size)

    @property
    def present(self) -> Tensor | None:
        """What the module has in the weight's place by now; None if that is computed."""
        return self.module._parameters.get(self.parameter_name.rpartition(".")[2])

    def rebind(self, weight: nn.Parameter) -> None:
        """From now on the layer is this parameter, which has taken the place of the former one."""
        object.__setattr__(self, "weight", weight)

    @property
    def _inputs_first(self) -> bool:
        return isinstance(self.module, TRANSPOSED) or _is_conv1d(self.module)

    @property
    def _groups(self) -> int:
        return self.module.groups if isinstance(self.module, TRANSPOSED) else 1

    @property
    def rows_dim(self) -> int:
        """The dimension of the weight along which the rows of the matrix run."""
        return 1 if self._inputs_first else 0

    def channels(self, shape: tuple[int, ...] | None = None) -> int:
        """Input channels of each output (of each group, where convolutions are grouped)."""
        shape = self.shape if shape is None else shape
        return shape[0] // self._groups if self._inputs_first else shape[1]

    def matrix_shape(self, shape: tuple[int, ...] | None = None) -> tuple[int, int]:
        """(rows, columns) of the matrix view of a weight of this shape (default: the whole)."""
        shape = self.shape if shape is None else shape
        cols = self.channels(shape) * math.prod(shape[2:])
        return math.prod(shape) // max(1, cols), cols

    def matrix(self, t: Tensor) -> Tensor:
        """A tensor of the weight's (local) shape as (rows, columns); a view where it can be."""
        if self._inputs_first:
            # (groups * in, out, ...) -> (groups, in, out, ...) -> (groups * out, in, ...)
            parts = t.reshape(self._groups, t.shape[0] // self._groups, *t.shape[1:])
            t = parts.transpose(1, 2).flatten(0, 1)
        if self.channels_inner and t.dim() > 2:
            t = t.flatten(2).transpose(1, 2)
        return t.flatten(1)

    def unmatrix(self, m: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The inverse of `matrix`: a tensor of the weight's (local) ``shape``."""
        channels, kernel = self.channels(shape), shape[2:]
        if self.channels_inner:
            m = m.reshape(len(m), math.prod(kernel), channels).transpose(1, 2)
        if not self._inputs_first:
            return m.reshape(shape)
        parts = m.reshape(self._groups, shape[1], channels, *kernel)
        return parts.transpose(1, 2).reshape(shape)

    def no_input_matrix(self) -> str:
        """Why `input_matrix` has no form for this layer; empty if it has."""
        conv = self.module
        if isinstance(conv, nn.Linear) or _is_conv1d(conv) or hasattr(conv, "input_matrix"):
            return ""
        if not isinstance(conv, nn.Conv1d | nn.Conv2d) or conv.groups != 1:
            return (
                f"{self.name} ({self.kind}): inputs are measured for Linear and ungrouped Conv1d "
                "and Conv2d only"
            )
        if type(conv).forward not in (nn.Conv1d.forward, nn.Conv2d.forward):
            return (
                f"{self.name}: {self.kind} has a forward of its own, so its patches are not known"
            )
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            return f"{self.name}: inputs are measured for numeric zero padding only"
        return ""

    def output_matrix(self, y: Tensor) -> Tensor:
        """The layer's output as (samples, rows), samples in the order of `input_matrix`."""
        if hasattr(self.module, "input_matrix"):  # a sparse convolution
            y = getattr(y, "features", y)
        elif isinstance(self.module, nn.Conv1d | nn.Conv2d):
            y = y.flatten(2).transpose(1, 2)
        y = y.reshape(-1, y.shape[-1])
        return y if self.qkv_part is None else y.chunk(3, 1)[self.qkv_part]

    def input_matrix(self, x: Tensor) -> Tensor:
        """The layer's input as (samples, columns), columns as in the matrix of the weight.

        Raises ValueError for layers whose inputs have no such form yet.
        """
        if message := self.no_input_matrix():
            raise ValueError(f"{message}; exclude it, or use a pruner that needs no inputs")
        if isinstance(self.module, nn.Linear) or _is_conv1d(self.module):
            return x.detach().reshape(-1, x.shape[-1])
        conv: Any = self.module
        if hasattr(conv, "input_matrix"):  # a sparse convolution
            return self._channels_last(conv.input_matrix(x))
        one_d = isinstance(conv, nn.Conv1d)
        x, ones = (x.unsqueeze(-2), (1,)) if one_d else (x, ())
        zeros = (0,) if one_d else ()
        patches = nn.functional.unfold(
            x.detach(),
            kernel_size=ones + conv.kernel_size,
            dilation=ones + conv.dilation,
            padding=zeros + conv.padding,
            stride=ones + conv.stride,
        )
        return self._channels_last(patches.transpose(1, 2).flatten(0, 1))

    def _channels_last(self, samples: Tensor) -> Tensor:
        """(samples, columns of ``weight.flatten(1)``) in the order of the matrix."""
        if not self.channels_inner:
            return samples
        kernels = samples.reshape(len(samples), self.channels(), -1)
        return kernels.transpose(1, 2).flatten(1)

    def with_channels_inner(self) -> Layer:
        return replace(self, channels_inner=True)


def _weights_of(module: nn.Module) -> list[str]:
    if isinstance(module, nn.MultiheadAttention):
        return [name for name in _ATTENTION if getattr(module, name) is not None]
    if isinstance(module, (nn.Linear, *CONVS, *TRANSPOSED)) or _is_conv1d(module):
        return ["weight"]
    return []


def _is_empty(weight: Tensor) -> bool:
    return not nn.parameter.is_lazy(weight) and weight.numel() == 0


def storage_of(weight: nn.Parameter) -> tuple[int, ...]:
    """What tied weights have in common: one Parameter, or views of one memory, in any order."""
    if nn.parameter.is_lazy(weight):
        return (id(weight),)
    part = local(weight.detach())
    pointer = part.data_ptr()  # meta and empty: no memory
    return (pointer, *itertools.chain(*places(part))) if pointer else (id(weight),)


def all_layers(model: nn.Module) -> Iterator[Layer]:
    """Every prunable weight in the order of registration, tied ones once, empty ones not.

    A weight that is computed (parametrized) is among them as no Parameter; `select` refuses it.
    """
    reshard(model)
    seen: set[tuple[int, ...]] = set()
    for full_name, module in unwrap(model).named_modules():
        if "_fsdp_wrapped_module" in module._modules:
            raise ValueError(
                "FSDP1 (FullyShardedDataParallel) flattens the weights, so masks cannot hold; use "
                "DDP or FSDP2 (torch.distributed.fsdp.fully_shard)"
            )
        for attribute in _weights_of(module):
            weight = getattr(module, attribute)
            if _is_empty(weight):
                continue
            if isinstance(weight, nn.Parameter):
                if storage_of(weight) in seen:
                    continue
                seen.add(storage_of(weight))
            name = clean_name(full_name)
            parameter = f"{name}.{attribute}" if name else attribute
            yield Layer(name if attribute == "weight" else parameter, parameter, module, weight)


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside DDP and torch.compile wrappers."""
    for attribute in ("_orig_mod", "module"):
        inner = model._modules.get(attribute)
        if inner is not None and len(model._modules) == 1:
            return unwrap(inner)
    return model


def working_precision(w: Tensor) -> Tensor:
    """The weights in at least single precision."""
    return w.to(torch.promote_types(w.dtype, torch.float32))
