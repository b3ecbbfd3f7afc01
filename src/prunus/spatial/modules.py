"""Pooling, and what is applied to features alone, with the names of spconv."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from prunus.spatial.maps import Ints
from prunus.spatial.tensor import SparseTensor


class SparseSequential(nn.Sequential):
    """A Sequential in which torch's own modules (BatchNorm1d, ReLU, Linear) act on the features."""

    def forward(self, x: Any) -> Any:
        for module in self:
            x = on_features(module, x)
        return x


def on_features(module: nn.Module, x: Any) -> Any:
    """A module of ours on the sparse tensor, any other on its features."""
    ours = getattr(module, "takes_sparse", None)
    if ours is None:
        ours = hasattr(module, "dataflow") or isinstance(module, SparseSequential)
    if isinstance(x, SparseTensor) and not ours:
        return x.replace_feature(module(x.features))
    return module(x)


class ToDense(nn.Module):
    """(batch, channels, *shape), zero where there is nothing."""

    takes_sparse = True

    def forward(self, x: SparseTensor) -> Tensor:
        return x.dense()


class _Pool(nn.Module):
    takes_sparse = True
    dims = 3

    def __init__(
        self, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
        indice_key: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        stride = kernel_size if stride is None else stride
        sizes = (kernel_size, stride, padding, dilation)
        self.sizes = tuple((s,) * self.dims if isinstance(s, int) else tuple(s) for s in sizes)
        self.indice_key = indice_key

    def forward(self, x: SparseTensor) -> SparseTensor:
        sites, kernel_map = x.sites.strided(*cast(tuple[Ints, Ints, Ints, Ints], self.sizes))
        convolutions = x.convolutions
        if self.indice_key is not None:
            convolutions = {**convolutions, self.indice_key: (x.sites, kernel_map)}
        gathered = x.features.index_select(0, kernel_map.source)
        target = kernel_map.target.long()[:, None].expand_as(gathered)
        pooled = gathered.new_zeros(kernel_map.outputs, gathered.shape[1])
        pooled = pooled.scatter_reduce(0, target, gathered, self.reduce, include_self=False)
        return SparseTensor.at(pooled, sites, convolutions)

    reduce = "amax"

    def extra_repr(self) -> str:
        kernel, stride, padding, dilation = self.sizes
        return f"{kernel}, stride={stride}, padding={padding}, dilation={dilation}"


class SparseMaxPool2d(_Pool):
    """The largest of the sites in each window that holds any."""

    dims = 2


class SparseMaxPool3d(_Pool):
    """The largest of the sites in each window that holds any."""


class SparseAvgPool2d(_Pool):
    """The mean of the sites in each window that holds any; empty ones do not count."""

    dims, reduce = 2, "mean"


class SparseAvgPool3d(_Pool):
    """The mean of the sites in each window that holds any; empty ones do not count."""

    reduce = "mean"


class SparseGlobalAvgPool(nn.Module):
    """(batch, channels) the mean of each example's sites; zero for an example without any."""

    takes_sparse = True

    def forward(self, x: SparseTensor) -> Tensor:
        example = x.indices[:, 0].long()
        sums = x.features.new_zeros(x.batch_size, x.features.shape[1])
        sums = sums.index_add(0, example, x.features)
        counts = torch.bincount(example, minlength=x.batch_size)
        return sums / counts.clamp(min=1)[:, None]
