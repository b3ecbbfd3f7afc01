"""Layers: the one place that knows Linear, convolutions, attention and transformers' Conv1D apart.

A `Layer` is one weight that can be pruned, seen as a matrix (outputs, inputs * kernel positions).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from prunus.core.masks import local
from prunus.core.patches import patches
from prunus.core.pieces import Piece
from prunus.core.raw_weights import RawWeight, raw_weights
from prunus.core.shared_memory import storage_of
from prunus.core.wrappers import clean_name, is_sharded, reshard, unwrap

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


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
    of input channels; without, columns are in the order of ``weight.flatten(1)``. With ``piece``
    only that part of the weight is meant: q, k or v in a fused one, one expert of a stack; its rows
    are the inputs where ``inputs_first`` says so.

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
    piece: Piece | None = None
    inputs_first: bool = False

    @property
    def kind(self) -> str:
        return _class_name(self.module)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole weight (or piece), on however many ranks it lies."""
        shape = tuple(self.weight.shape)
        return shape if self.piece is None else self.piece.shape(shape)

    @property
    def local(self) -> Tensor:
        """This rank's part of the weight, detached, sharing its memory."""
        return self.part(local(self.weight.detach()))

    def part(self, t: Tensor) -> Tensor:
        """The layer's piece of a tensor of its parameter's local shape; a view."""
        return t if self.piece is None else self.piece.of(t)

    @property
    def part_key(self) -> int | None:
        """What tells the layer from others of its parameter; None if it is all of it."""
        return None if self.piece is None else self.piece.key

    @property
    def present(self) -> Tensor | None:
        """What the module has in the weight's place by now; None if that is computed."""
        return self.module._parameters.get(self.parameter_name.rpartition(".")[2])

    def rebind(self, weight: nn.Parameter) -> None:
        """From now on the layer is this parameter, which has taken the place of the former one."""
        object.__setattr__(self, "weight", weight)

    @property
    def _inputs_first(self) -> bool:
        stored = isinstance(self.module, TRANSPOSED) or _is_conv1d(self.module)
        return stored or self.inputs_first

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

    @property
    def is_convolution(self) -> bool:
        return isinstance(self.module, CONVS)

    @property
    def is_module(self) -> bool:
        """Whether the weight is the one of a module that does nothing but multiply with it."""
        known = self.is_linear or isinstance(self.module, (*CONVS, *TRANSPOSED))
        return self.piece is None and (known or hasattr(self.module, "input_matrix"))

    @property
    def is_linear(self) -> bool:
        """Whether it is all of a Linear or Conv1D, or a third of its outputs."""
        return isinstance(self.module, nn.Linear) or _is_conv1d(self.module)

    @property
    def reads_arguments(self) -> bool:
        """Whether the weight is multiplied with what the module is called with, as it is.

        Else its inputs are found where the product is computed.
        """
        conv: Any = self.module
        if self.is_linear or hasattr(conv, "input_matrix"):
            return True
        known = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
        plain = self.is_convolution and type(conv).forward in known and conv.groups == 1
        return plain and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)

    def no_inputs(self) -> str:
        """Why the layer's inputs cannot be measured; empty if they can."""
        if isinstance(self.module, TRANSPOSED):
            return f"{self.name} ({self.kind}): inputs of transposed convolutions are not measured"
        if self.piece is None and getattr(self.module, "groups", 1) > 1:
            return f"{self.name} ({self.kind}): each group of its channels has inputs of its own"
        if is_sharded(self.weight) and not self.reads_arguments:
            return f"{self.name} ({self.kind}): its inputs cannot be measured where it is sharded"
        return ""

    def output_matrix(self, y: Tensor) -> Tensor:
        """The layer's output as (samples, rows), samples in the order of `input_matrix`."""
        if hasattr(self.module, "input_matrix"):  # a sparse convolution
            y = getattr(y, "features", y)
        elif self.is_convolution:
            y = y.flatten(2).transpose(1, 2)
        y = y.reshape(-1, y.shape[-1])
        return y if self.piece is None else y.chunk(self.piece.count, 1)[self.piece.number]

    def input_matrix(self, x: Tensor) -> Tensor:
        """What the module is called with as (samples, columns), columns as in the weight's matrix.

        Raises ValueError for layers that do not compute with that as it is.
        """
        if message := self.no_inputs():
            raise ValueError(f"{message}; exclude it, or use a pruner that needs no inputs")
        if not self.reads_arguments:
            raise ValueError(
                f"{self.name}: {self.kind} does not compute with its arguments as they are"
            )
        if self.is_linear:
            return x.detach().reshape(-1, x.shape[-1])
        conv: Any = self.module
        if hasattr(conv, "input_matrix"):  # a sparse convolution
            return self.channels_last(conv.input_matrix(x))
        form = conv.kernel_size, conv.stride, conv.padding, conv.dilation
        return self.channels_last(patches(x.detach(), *form))

    def channels_last(self, samples: Tensor) -> Tensor:
        """(samples, columns of ``weight.flatten(1)``) in the order of the matrix."""
        if not self.channels_inner:
            return samples
        kernels = samples.reshape(len(samples), self.channels(), -1)
        return kernels.transpose(1, 2).flatten(1)

    def with_channels_inner(self) -> Layer:
        return replace(self, channels_inner=True)


def weights_of(module: nn.Module) -> Iterable[RawWeight]:
    if isinstance(module, (nn.Linear, *CONVS, *TRANSPOSED)) or _is_conv1d(module):
        return [RawWeight("weight")]
    return raw_weights(module)


def _is_empty(weight: Tensor) -> bool:
    return not nn.parameter.is_lazy(weight) and weight.numel() == 0


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
        tied: set[str] = set()
        for attribute, piece, inputs_first in weights_of(module):
            weight = getattr(module, attribute)
            if _is_empty(weight):
                continue
            if isinstance(weight, nn.Parameter) and (piece is None or piece.number == 0):
                if storage_of(weight) in seen:
                    tied.add(attribute)
                seen.add(storage_of(weight))
            # of the experts in a sharded stack, each rank has others
            if attribute in tied or (piece is not None and is_sharded(weight)):
                continue
            name = clean_name(full_name)
            parameter = f"{name}.{attribute}" if name else attribute
            called = parameter
            if piece is not None and piece.kind == "expert":
                called = f"{parameter}[{piece.number}]"
            elif attribute == "weight":
                called = name
            yield Layer(called, parameter, module, weight, False, piece, inputs_first)


def working_precision(w: Tensor) -> Tensor:
    """The weights in at least single precision."""
    return w.to(torch.promote_types(w.dtype, torch.float32))
