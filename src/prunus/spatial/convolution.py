"""Sparse convolutions as modules, with the names and arguments of spconv.

Graham et al., "3D Semantic Segmentation with Submanifold Sparse Convolutional Networks", CVPR 2018,
https://arxiv.org/abs/1711.10275. They are torch's own convolutions in all but `forward`: the weight
has the shape of `torch.nn.Conv3d` (spconv's has channels last, see `from_spconv`), and so every
pruner knows them. Offsets whose weights are all zero are skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from prunus.spatial.dataflows import DATAFLOWS, convolve
from prunus.spatial.maps import Ints, KernelMap
from prunus.spatial.tensor import SparseTensor
from prunus.spatial.tuning import fastest

Size = int | Sequence[int]


class SparseConvolution(nn.modules.conv._ConvNd):
    """What all of them share. Subclasses say which map they run over."""

    dataflow = "gather_scatter"
    """a name in `DATAFLOWS`, or ``auto``: measured at the first forward pass of each size"""
    indice_key: str | None = None

    def _kernel_map(self, x: SparseTensor) -> tuple[SparseTensor, KernelMap]:
        """A tensor at the output's sites, whose features do not matter, and the map."""
        raise NotImplementedError

    def forward(self, input: Any) -> Any:
        """A `SparseTensor` to a `SparseTensor`."""
        x: SparseTensor = input
        if x.features.shape[1] != self.in_channels:
            raise ValueError(
                f"{x.features.shape[1]} channels for {self.in_channels}; see in_channels="
            )
        out, kernel_map = self._kernel_map(x)
        features, weight = self._cast(x.features)
        kernel_map = self._without_empty_offsets(weight, kernel_map)
        flow = self._dataflow(features, weight, kernel_map)
        result = convolve(features, weight, kernel_map, DATAFLOWS[flow])
        if self.bias is not None:
            result = result + self.bias.to(result.dtype)
        return SparseTensor.at(result, out.sites, out.convolutions)

    def matrices(self) -> Tensor:
        """(offsets, in, out) the weight as one matrix for each offset."""
        return self.weight.flatten(2).permute(2, 1, 0).contiguous()

    def _cast(self, features: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.matrices()
        kind = features.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            return features.to(dtype), weight.to(dtype)
        return features, weight

    def _without_empty_offsets(self, weight: Tensor, kernel_map: KernelMap) -> KernelMap:
        """Pruned offsets are skipped, but in training, where their gradient may be wanted."""
        if self.training and self.weight.requires_grad:
            return kernel_map
        empty = (weight.detach() == 0).flatten(1).all(1)
        return kernel_map.without(empty.tolist()) if bool(empty.any()) else kernel_map

    def _dataflow(self, features: Tensor, weight: Tensor, kernel_map: KernelMap) -> str:
        if self.dataflow in DATAFLOWS:
            return self.dataflow
        if self.dataflow != "auto":
            names = ", ".join(DATAFLOWS)
            raise ValueError(f"dataflow={self.dataflow!r}; use {names} or auto")
        measured: dict[Any, str] = self.__dict__.setdefault("_measured", {})
        key = features.device, features.dtype, kernel_map.count.bit_length()
        if key not in measured:
            measured[key] = fastest(features.detach(), weight.detach(), kernel_map)
        return measured[key]

    def input_matrix(self, x: SparseTensor) -> Tensor:
        """(outputs, columns of ``weight.flatten(1)``) what each output is computed from."""
        _, kernel_map = self._kernel_map(x)
        features = x.features.detach()
        padded = torch.cat([features, features.new_zeros(1, features.shape[1])])
        gathered = padded[kernel_map.table()]  # (outputs, offsets, channels)
        return gathered.transpose(1, 2).flatten(1)


def _check_groups(groups: int) -> None:
    if groups != 1:
        raise ValueError(f"groups={groups}; sparse convolutions have one group")


class _Submanifold(SparseConvolution):
    def _kernel_map(self, x: SparseTensor) -> tuple[SparseTensor, KernelMap]:
        return x, x.sites.submanifold(self.kernel_size, self.dilation)

    def _check(self) -> None:
        _check_groups(self.groups)
        if any(s != 1 for s in self.stride):
            raise ValueError(f"stride={self.stride}; a submanifold convolution has stride 1")
        if any(k % 2 == 0 for k in self.kernel_size):
            raise ValueError(f"kernel_size={self.kernel_size} has no centre; use odd sizes")


class _Strided(SparseConvolution):
    def _kernel_map(self, x: SparseTensor) -> tuple[SparseTensor, KernelMap]:
        size = (self.kernel_size, self.stride, self.padding, self.dilation)
        sites, kernel_map = x.sites.strided(*cast(tuple[Ints, Ints, Ints, Ints], size))
        convolutions = x.convolutions
        if self.indice_key is not None:
            convolutions = {**convolutions, self.indice_key: (x.sites, kernel_map)}
        return SparseTensor.at(x.features, sites, convolutions), kernel_map


class _Inverse(SparseConvolution):
    def _kernel_map(self, x: SparseTensor) -> tuple[SparseTensor, KernelMap]:
        if self.indice_key not in x.convolutions:
            known = ", ".join(map(repr, x.convolutions)) or "none"
            raise ValueError(
                f"indice_key={self.indice_key!r} names no convolution that led here (known: "
                f"{known}); give a SparseConv that key"
            )
        sites, kernel_map = x.convolutions[self.indice_key]
        if len(kernel_map.sizes) != self.weight[0, 0].numel():
            raise ValueError(
                f"kernel_size={self.kernel_size} is not that of the convolution "
                f"{self.indice_key!r}, which has {len(kernel_map.sizes)} offsets"
            )
        if kernel_map.outputs != len(x.features):
            raise ValueError(f"{self.indice_key!r} led to other sites than these")
        return SparseTensor.at(x.features, sites, x.convolutions), kernel_map.transposed()


class SubMConv2d(_Submanifold, nn.Conv2d):
    """A 2-D convolution whose output has the sites of its input, so that it does not dilate.

    ``padding`` is accepted and ignored, as in spconv: the kernel is centred on each site.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1,
        padding: Size = 0, dilation: Size = 1, groups: int = 1, bias: bool = True,
        indice_key: str | None = None, dataflow: str = "gather_scatter", **options: Any,
    ) -> None:  # fmt: skip
        sizes = _pair(kernel_size), _pair(stride), _pair(padding), _pair(dilation)
        nn.Conv2d.__init__(self, in_channels, out_channels, *sizes, groups, bias, **options)
        self.indice_key, self.dataflow = indice_key, dataflow
        self._check()


class SubMConv3d(_Submanifold, nn.Conv3d):
    """A 3-D convolution whose output has the sites of its input, so that it does not dilate.

    ``padding`` is accepted and ignored, as in spconv: the kernel is centred on each site.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1,
        padding: Size = 0, dilation: Size = 1, groups: int = 1, bias: bool = True,
        indice_key: str | None = None, dataflow: str = "gather_scatter", **options: Any,
    ) -> None:  # fmt: skip
        sizes = _triple(kernel_size), _triple(stride), _triple(padding), _triple(dilation)
        nn.Conv3d.__init__(self, in_channels, out_channels, *sizes, groups, bias, **options)
        self.indice_key, self.dataflow = indice_key, dataflow
        self._check()


class SparseConv2d(_Strided, nn.Conv2d):
    """A 2-D convolution with an output wherever its window holds an input."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1,
        padding: Size = 0, dilation: Size = 1, groups: int = 1, bias: bool = True,
        indice_key: str | None = None, dataflow: str = "gather_scatter", **options: Any,
    ) -> None:  # fmt: skip
        sizes = _pair(kernel_size), _pair(stride), _pair(padding), _pair(dilation)
        nn.Conv2d.__init__(self, in_channels, out_channels, *sizes, groups, bias, **options)
        self.indice_key, self.dataflow = indice_key, dataflow
        _check_groups(groups)


class SparseConv3d(_Strided, nn.Conv3d):
    """A 3-D convolution with an output wherever its window holds an input."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1,
        padding: Size = 0, dilation: Size = 1, groups: int = 1, bias: bool = True,
        indice_key: str | None = None, dataflow: str = "gather_scatter", **options: Any,
    ) -> None:  # fmt: skip
        sizes = _triple(kernel_size), _triple(stride), _triple(padding), _triple(dilation)
        nn.Conv3d.__init__(self, in_channels, out_channels, *sizes, groups, bias, **options)
        self.indice_key, self.dataflow = indice_key, dataflow
        _check_groups(groups)


class SparseInverseConv2d(_Inverse, nn.Conv2d):
    """Back to the sites before the SparseConv2d of the same ``indice_key``."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size,
        indice_key: str | None = None, bias: bool = True,
        dataflow: str = "gather_scatter", **options: Any,
    ) -> None:  # fmt: skip
        size = _pair(kernel_size)
        nn.Conv2d.__init__(self, in_channels, out_channels, size, bias=bias, **options)
        self.indice_key, self.dataflow = indice_key, dataflow


class SparseInverseConv3d(_Inverse, nn.Conv3d):
    """Back to the sites before the SparseConv3d of the same ``indice_key``."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size,
        indice_key: str | None = None, bias: bool = True,
        dataflow: str = "gather_scatter", **options: Any,
    ) -> None:  # fmt: skip
        size = _triple(kernel_size)
        nn.Conv3d.__init__(self, in_channels, out_channels, size, bias=bias, **options)
        self.indice_key, self.dataflow = indice_key, dataflow


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else cast(tuple[int, int], tuple(size))


def _triple(size: Size) -> tuple[int, int, int]:
    return (size,) * 3 if isinstance(size, int) else cast(tuple[int, int, int], tuple(size))


def from_spconv(weight: Tensor) -> Tensor:
    """A weight of spconv 2, (out, *kernel, in), as ours, (out, in, *kernel)."""
    return weight.movedim(-1, 1).contiguous()


def offset_pattern(conv: SparseConvolution) -> str:
    """The pattern of `prunus.prune` whose units are the layer's kernel offsets, as ``"32x16"``.

    A pruned offset takes no gather, no product and no scatter.
    """
    return f"{conv.out_channels}x{conv.in_channels}"
