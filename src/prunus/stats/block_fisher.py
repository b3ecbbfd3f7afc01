"""The empirical Fisher matrix of a layer, from gradients.

E. Frantar, E. Kurtic, D. Alistarh, "M-FAC", 2021, https://arxiv.org/abs/2107.03356, section 2; in
blocks, E. Kurtic et al., "The optimal BERT surgeon", 2022, https://arxiv.org/abs/2203.07259, eq. 6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from torch import Tensor

from prunus.stats.base import Sampling, Statistic, register_statistic
from prunus.stats.fisher_blocks import FisherBlocks, add_to_factors, needs_double, unit_for

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}  # of float64 blocks worked on at once


PerBlock = Callable[..., Tensor]


@register_statistic
class BlockFisher(Statistic):
    """One Fisher matrix for every `block_size` consecutive weights of a row.

    ``F_b = damp I + 1/m sum_k g_k g_k^T`` over the m gradients of the mean loss. Blocks do not
    cross rows: the last one of a row may be smaller. Holds ``min(num_grads, block_size)`` numbers
    for each weight: with fewer gradients than the block is long, the gradients themselves, of which
    the inverse is computed by its dual form; in bfloat16 a triangular factor of each block, which
    no rounding makes indefinite.

    >>> stat = prunus.BlockFisher(1, 2, sampling=prunus.Sampling(4), block_size=2, damp=0.5)
    >>> stat.update(torch.ones(4, 1, 2))
    >>> stat.mul(torch.ones(1, 2))
    tensor([[2.5000, 2.5000]])
    >>> stat.inverse_block(0)
    tensor([[ 1.2000, -0.8000],
            [-0.8000,  1.2000]], dtype=torch.float64)
    """

    name: ClassVar[str] = "block_fisher"
    reads = "gradients"
    by_rows = True
    sampling: Sampling

    def __init__(
        self,
        rows: int,
        cols: int,
        *,
        sampling: Sampling,
        block_size: int,
        damp: float,
        device: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.rows, self.cols = rows, cols
        self.sampling, self.damp, self.device, self.dtype = sampling, damp, device, dtype
        self.block_size = min(block_size, cols)
        self.dual = sampling.num_grads < self.block_size
        self.factored = not self.dual and dtype == torch.bfloat16
        self.count = 0
        self._sums: list[Tensor] = []
        self._waiting: list[Tensor] = []
        self._peaks = self._unit = torch.zeros(0)
        self._chunk = max(1, min(64, self.block_size // 4))

    def with_rows(self, rows: int) -> BlockFisher:
        """An empty one with the same settings for another number of rows."""
        return type(self)(
            rows,
            self.cols,
            sampling=self.sampling,
            block_size=self.block_size,
            damp=self.damp,
            device=self.device,
            dtype=self.dtype,
        )

    def _cuts(self) -> list[tuple[slice, int]]:
        """Columns and block size of the whole blocks, and of the last ones where smaller."""
        d, whole = self.block_size, self.cols // self.block_size * self.block_size
        rest = self.cols - whole
        return [(slice(0, whole), d), *([(slice(whole, self.cols), rest)] if rest else [])]

    @property
    def nbytes(self) -> int:
        """Bytes it holds, gradients that wait to be added included."""
        if self.dual:
            return int(self.rows * self.cols * self.sampling.num_grads * self.dtype.itemsize)
        squares = sum((cut.stop - cut.start) * d for cut, d in self._cuts())
        waiting = self._chunk * self.cols * max(4, self.dtype.itemsize)
        return int(self.rows * (squares * self.dtype.itemsize + waiting))

    def shortage(self) -> str:
        few = 0 < self.count < self.block_size
        return f"{self.count} gradients for blocks of {self.block_size} weights" if few else ""

    def tensors(self) -> list[Tensor]:
        return self._sums

    def update(self, grads: Tensor) -> None:
        """Take in (samples, rows, cols) gradients."""
        if len(grads) == 0 or self.rows == 0:
            return
        self.count += len(grads)
        if self.dual:
            self._store(grads)
            return
        self._waiting.append(grads.to(torch.promote_types(self.dtype, torch.float32)))
        if sum(map(len, self._waiting)) >= self._chunk:
            self._flush()

    def _store(self, grads: Tensor) -> None:
        if not self._sums:
            shape = self.sampling.num_grads, self.rows, self.cols
            place = grads.device if self.device is None else self.device
            self._sums = [torch.zeros(shape, dtype=self.dtype, device=place)]
        self._sums[0][self.count - len(grads) : self.count] = grads

    def _flush(self) -> None:
        """Add the gradients that wait, in one product for each block."""
        if not self._waiting:
            return
        g = torch.cat(self._waiting) if len(self._waiting) > 1 else self._waiting[0]
        self._waiting = []
        g = self._in_units(g)
        place = g.device if self.device is None else torch.device(self.device)
        if not self._sums:
            self._sums = [
                torch.zeros(
                    self.rows * ((cut.stop - cut.start) // d), d, d, dtype=self.dtype, device=place
                )
                for cut, d in self._cuts()
            ]
        for (cut, d), sums in zip(self._cuts(), self._sums, strict=True):
            blocks = g[:, :, cut].reshape(len(g), -1, d).transpose(0, 1)
            if self.factored:
                step = max(1, CHUNK_BYTES["cpu"] // (d * d * 8))
                parts = torch.split(sums, step), torch.split(blocks, step)
                for factors, more in zip(*parts, strict=True):
                    add_to_factors(factors, more.to(factors.device))
                continue
            if sums.device == g.device and sums.dtype == g.dtype:
                sums.baddbmm_(blocks.mT, blocks)
                continue
            step = max(1, CHUNK_BYTES["cpu"] // (d * d * g.element_size()))
            for part, more in zip(torch.split(sums, step), torch.split(blocks, step), strict=True):
                part += torch.bmm(more.mT, more).to(part)  # computed where the gradients are

    def _in_units(self, g: Tensor) -> Tensor:
        """The gradients in the unit of their rows, so that their squares neither vanish nor burst.

        The sums follow where it changes.
        """
        peaks = g.abs().amax((0, 2))
        peaks = torch.maximum(peaks, self._peaks.to(peaks)) if len(self._peaks) else peaks
        unit = unit_for(peaks.double())
        if not len(self._unit):
            self._unit = torch.ones_like(unit)
        if self._sums and bool((unit != self._unit).any()):
            for sums in self._sums:
                ratio = (self._unit / unit).repeat_interleave(len(sums) // len(unit))
                sums.mul_((ratio if self.factored else ratio.square()).to(sums).view(-1, 1, 1))
        self._peaks, self._unit = peaks, unit
        if bool((unit == 1).all()):
            return g
        return g / unit.view(1, -1, 1).to(g)

    def _blocks(self, data: Tensor, rows: slice, each: int) -> FisherBlocks:
        """The blocks of some rows, so many of each."""
        unit = self._unit[rows]
        units = None if bool((unit == 1).all()) else unit.repeat_interleave(each)
        return FisherBlocks(data, self.count, self.damp, self.dual or self.factored, units)

    def _chunks(self, place: torch.device) -> Iterator[tuple[slice, slice, FisherBlocks]]:
        """(rows, columns, blocks) small enough to work on at once, on the device `place`."""
        self._flush()
        assert self._sums, "no gradient has been taken in"
        limit = CHUNK_BYTES.get(place.type, CHUNK_BYTES["cpu"])
        for i, (cut, d) in enumerate(self._cuts()):
            each = (cut.stop - cut.start) // d
            step = max(1, limit // (each * d * d * 8))
            for begin in range(0, self.rows, step):
                rows = slice(begin, min(begin + step, self.rows))
                if self.dual:
                    data = self._sums[0][: max(1, self.count), rows, cut]
                    data = data.reshape(len(data), -1, d).transpose(0, 1)
                else:
                    data = self._sums[i][rows.start * each : rows.stop * each]
                yield rows, cut, self._blocks(data.to(place), rows, each)

    def per_block(self, function: PerBlock, *matrices: Tensor) -> Tensor:
        """(rows, cols) of ``function(blocks, *parts)``, chunk by chunk.

        ``function`` gets `FisherBlocks` of n blocks and the (n, d) parts of the (rows, cols)
        matrices in them, and returns (n, d). Computed on the matrices' device; the result has the
        dtype of the first of them, but at least single precision, and double where that is needed.
        """
        place, dtype = matrices[0].device, matrices[0].dtype
        dtype = torch.promote_types(dtype, torch.float32)
        result = torch.empty(self.rows, self.cols, dtype=dtype, device=place)
        for rows, cut, blocks in self._chunks(place) if self.rows else ():
            d = blocks.data.shape[2]
            parts = [matrix[rows, cut].reshape(-1, d) for matrix in matrices]
            values = function(blocks, *parts).reshape(rows.stop - rows.start, -1)
            if result.dtype == torch.float32 and needs_double(values):
                result = result.double()
            result[rows, cut] = values
        return result

    def diag(self) -> Tensor:
        """(rows, cols) the diagonal of F, damp included."""
        self._flush()
        if not self._sums:  # no rows on this rank
            return torch.empty(self.rows, self.cols)
        like = self._sums[0].new_empty(self.rows, self.cols)
        return self.per_block(lambda blocks, _: blocks.fisher().diagonal(dim1=1, dim2=2), like)

    def mul(self, v: Tensor) -> Tensor:
        """(rows, cols) the product F v with a (rows, cols) matrix, read as one long vector."""
        return self.per_block(
            lambda blocks, x: torch.bmm(blocks.fisher(), x.double().unsqueeze(2)).squeeze(2), v
        )

    def inverse_block(self, i: int) -> Tensor:
        """(d, d) the inverse of the i-th block, counted along the first row, then the second.

        Computed where the matrix is stored.

        Raises IndexError if there are not so many.
        """
        each = -(-self.cols // self.block_size)
        if not 0 <= i < self.rows * each:
            raise IndexError(f"block {i} of {self.rows * each}")
        self._flush()
        row, begin = i // each, i % each * self.block_size
        for sums, (cut, d) in zip(self._sums * 2, self._cuts(), strict=False):
            if cut.start <= begin < cut.stop:
                if self.dual:
                    data = self._sums[0][: self.count, row, begin : begin + d].unsqueeze(0)
                else:
                    at = row * ((cut.stop - cut.start) // d) + (begin - cut.start) // d
                    data = sums[at : at + 1]
                return self._blocks(data, slice(row, row + 1), 1).inverse()[0]
        raise AssertionError("every block lies in some cut")
