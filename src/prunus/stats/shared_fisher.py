"""A Fisher matrix that all rows of a layer share.

D. Kuznedelev, E. Kurtic, E. Frantar, D. Alistarh, "CAP: correlation-aware pruning for
highly-accurate sparse vision models", 2023, https://arxiv.org/abs/2210.09223, section 3.2.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from prunus.core.ranks import Ranks
from prunus.stats.base import Sampling, Statistic, register_statistic
from prunus.stats.fisher_blocks import unit_for


@register_statistic
class SharedFisher(Statistic):
    """One Fisher matrix that all rows of a layer share.

    ``F = 2/m sum_k sum_r g_kr g_kr^T`` over gradients k and rows r (and over the blocks of a row,
    where `block_size` cuts it), (block_size, block_size). Not damped here.

    >>> stat = prunus.SharedFisher(2, sampling=prunus.Sampling(1), block_size=None)
    >>> stat.update(torch.ones(1, 3, 2))
    >>> stat.matrix()
    tensor([[6., 6.],
            [6., 6.]], dtype=torch.float64)
    """

    name: ClassVar[str] = "shared_fisher"
    reads = "gradients"
    sampling: Sampling

    def __init__(
        self,
        cols: int,
        *,
        sampling: Sampling,
        block_size: int | None,
        device: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.cols, self.sampling, self.device, self.dtype = cols, sampling, device, dtype
        self.block_size = cols if block_size is None else min(block_size, cols)
        self._sum = torch.zeros(0)
        self._count = torch.zeros(1)
        self._peak = self._unit = 0.0

    @property
    def nbytes(self) -> int:
        return int(self.dtype.itemsize * self.block_size**2 + 4)

    @property
    def count(self) -> int:
        return int(self._count)

    def _begin(self, device: torch.device | str) -> None:
        if not self._sum.numel():
            place = device if self.device is None else self.device
            shape = self.block_size, self.block_size
            self._sum = torch.zeros(shape, dtype=self.dtype, device=place)

    def tensors(self) -> list[Tensor]:
        self._begin("cpu")
        return [self._sum, self._count]

    def update(self, grads: Tensor) -> None:
        """Take in (samples, rows, cols) gradients."""
        self._begin(grads.device)
        self._count += len(grads)
        if grads.numel() == 0:  # a rank without rows of this layer
            return
        d, whole = self.block_size, self.cols // self.block_size * self.block_size
        self._grow(max(self._peak, float(grads.abs().amax())))
        g = grads.to(self.dtype) / self._unit
        blocks, rest = g[..., :whole].reshape(-1, d), g[..., whole:].flatten(0, -2)
        self._sum += (blocks.mT @ blocks).to(self._sum)
        if t := self.cols - whole:
            self._sum[:t, :t] += (rest.mT @ rest).to(self._sum)

    def _grow(self, peak: float) -> None:
        """Gradients of this size are to be summed: in units whose squares are numbers."""
        unit = float(unit_for(torch.tensor(peak, dtype=torch.float64)))
        if self._unit and self._unit != unit:
            self._sum *= (self._unit / unit) ** 2
        self._peak, self._unit = peak, unit

    def align(self, ranks: Ranks) -> None:
        """The largest unit of all ranks is that of each sum."""
        peaks = torch.zeros(ranks.world_size, dtype=torch.float64)
        peaks[ranks.rank] = self._peak
        self._begin("cpu")
        self._grow(float(ranks.all_reduce(peaks).max()))

    def matrix(self) -> Tensor:
        """(block_size, block_size) in float64."""
        self._begin("cpu")
        return 2 * self._unit**2 * self._sum.double() / max(1, self.count)
