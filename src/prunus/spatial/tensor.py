"""Sparse activations: features at some sites of a grid, and nothing anywhere else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prunus.spatial.keys import Grid
from prunus.spatial.maps import Ints, KernelMap, strided_map, submanifold_map


@dataclass(eq=False)
class Sites:
    """Where there is something; maps between sites are made once and kept here."""

    indices: Tensor
    """(N, 1 + D) int32: example, then place"""
    shape: Ints
    batch_size: int
    _submanifold: dict[tuple[Ints, Ints], KernelMap] = field(default_factory=dict, repr=False)
    _strided: dict[tuple[Ints, ...], tuple[Sites, KernelMap]] = field(
        default_factory=dict, repr=False
    )

    def submanifold(self, kernel: Ints, dilation: Ints) -> KernelMap:
        """The map from these sites to themselves."""
        key = kernel, dilation
        if key not in self._submanifold:
            self._submanifold[key] = submanifold_map(
                self.indices, self.shape, self.batch_size, kernel, dilation
            )
        return self._submanifold[key]

    def strided(
        self, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints
    ) -> tuple[Sites, KernelMap]:
        """The sites that a convolution reaches from here, and the map to them."""
        key = kernel, stride, padding, dilation
        if key not in self._strided:
            indices, shape, kernel_map = strided_map(
                self.indices, self.shape, self.batch_size, kernel, stride, padding, dilation
            )
            self._strided[key] = Sites(indices, shape, self.batch_size), kernel_map
        return self._strided[key]

    def flat(self) -> Tensor:
        """(N,) where each site lies in a dense (batch, *shape)."""
        return Grid(self.shape, (0,) * len(self.shape)).keys(self.indices, self.batch_size).long()


class SparseTensor:
    """Features (N, C) at sites (N, 1 + D) of a 2-D or 3-D grid, the example's number first.

    The constructor is that of spconv's ``SparseConvTensor``, whose name it has too.

    >>> import torch
    >>> from prunus import spatial
    >>> x = torch.zeros(1, 2, 4, 4)
    >>> x[0, :, 1, 2] = 3.0
    >>> spatial.SparseTensor.from_dense(x)
    SparseTensor(1 of 16 sites, 2 channels, shape (4, 4), batch of 1)

    Raises ValueError for sites outside the grid, and for one that is there twice.
    """

    def __init__(
        self, features: Tensor, indices: Tensor, spatial_shape: Sequence[int], batch_size: int
    ) -> None:
        shape = tuple(map(int, spatial_shape))
        _check(features, indices, shape, batch_size)
        self.features = features
        self.sites = Sites(indices.int(), shape, batch_size)
        self.convolutions: dict[str, tuple[Sites, KernelMap]] = {}
        """indice_key -> sites before a convolution and its map, for the inverse"""

    @classmethod
    def at(
        cls,
        features: Tensor,
        sites: Sites,
        convolutions: dict[str, tuple[Sites, KernelMap]] | None = None,
    ) -> SparseTensor:
        """Features at sites that are known to be good."""
        result = cls.__new__(cls)
        result.features, result.sites = features, sites
        result.convolutions = {} if convolutions is None else convolutions
        return result

    @classmethod
    def from_dense(cls, x: Tensor, threshold: float = 0.0) -> SparseTensor:
        """The sites of (batch, channels, *shape) where a channel exceeds the threshold in size.

        Unlike spconv's, channels come second, as everywhere in PyTorch.
        """
        there = (x.detach().abs() > threshold).any(1)
        indices = there.nonzero()
        features = x.movedim(1, -1)[there]
        return cls.at(features, Sites(indices.int(), tuple(x.shape[2:]), len(x)))

    @property
    def indices(self) -> Tensor:
        return self.sites.indices

    @property
    def spatial_shape(self) -> Ints:
        return self.sites.shape

    @property
    def batch_size(self) -> int:
        return self.sites.batch_size

    @property
    def density(self) -> float:
        """Share of the grid's sites that are there."""
        return len(self.features) / max(1, self.batch_size * math.prod(self.spatial_shape))

    def replace_feature(self, features: Tensor) -> SparseTensor:
        """Other features at the same sites."""
        if len(features) != len(self.features):
            raise ValueError(f"{len(features)} features for {len(self.features)} sites")
        return SparseTensor.at(features, self.sites, self.convolutions)

    def dense(self, channels_first: bool = True) -> Tensor:
        """(batch, channels, *shape), zero where there is nothing."""
        sites = self.batch_size * math.prod(self.spatial_shape)
        result = self.features.new_zeros(sites, self.features.shape[1])
        result = result.index_put((self.sites.flat(),), self.features)
        result = result.reshape(self.batch_size, *self.spatial_shape, -1)
        return result.movedim(-1, 1).contiguous() if channels_first else result

    def to(self, *args: object, **kwargs: object) -> SparseTensor:
        """Features as by `Tensor.to`, sites on the same device; maps are made anew there."""
        features = self.features.to(*args, **kwargs)  # type: ignore[call-overload]
        sites = self.sites
        if features.device != sites.indices.device:
            sites = Sites(sites.indices.to(features.device), sites.shape, sites.batch_size)
            return SparseTensor.at(features, sites)
        return SparseTensor.at(features, sites, self.convolutions)

    def __repr__(self) -> str:
        sites = self.batch_size * math.prod(self.spatial_shape)
        return (
            f"SparseTensor({len(self.features)} of {sites} sites, {self.features.shape[1]} "
            f"channels, shape {self.spatial_shape}, batch of {self.batch_size})"
        )


def _check(features: Tensor, indices: Tensor, shape: Ints, batch_size: int) -> None:
    if features.dim() != 2 or indices.shape != (len(features), len(shape) + 1):
        raise ValueError(
            f"features {tuple(features.shape)} and indices {tuple(indices.shape)} do not fit a "
            f"{len(shape)}-D grid; use (N, C) and (N, {len(shape) + 1}), the example's number first"
        )
    if not len(indices):
        return
    bounds = torch.tensor([batch_size, *shape], device=indices.device)
    outside = ((indices < 0) | (indices >= bounds)).any(1)
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"indices[{row}] = {indices[row].tolist()} is outside {batch_size} examples of {shape}"
        )
    keys = Grid(shape, (0,) * len(shape)).keys(indices, batch_size).sort()
    twice = (keys.values[1:] == keys.values[:-1]).nonzero()
    if len(twice):
        row = int(keys.indices[int(twice[0]) + 1])
        raise ValueError(
            f"indices[{row}] = {indices[row].tolist()} is there twice; merge the features of equal "
            "sites first"
        )
