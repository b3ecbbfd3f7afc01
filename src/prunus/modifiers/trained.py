"""One layer in N:M training."""

from __future__ import annotations

import torch
from torch import Tensor

from prunus.distributed import ranks_of
from prunus.layers import Layer
from prunus.masking import Masking
from prunus.method import LayerRow
from prunus.structure import Groups


class Trained:
    """A layer, its patterns in turn, and its dense weight while that is hidden."""

    def __init__(self, layer: Layer, patterns: list[Groups]) -> None:
        self.layer, self.patterns = layer, patterns
        self.dense: Tensor | None = None
        self._version = -1

    def choose(self, progress: float) -> Tensor:
        """The keep-mask of the moment, from the magnitudes of the dense weight in the model."""
        w, layer = self.layer.local, self.layer
        pattern = self.patterns[min(int(progress * len(self.patterns)), len(self.patterns) - 1)]
        return layer.unmatrix(pattern.mask(layer.matrix(w.abs()), 0), tuple(w.shape))

    def mark(self) -> None:
        """From here on `written` counts."""
        self._version = self.layer.local._version

    def written(self, masking: Masking, mask: Tensor, beta: float) -> bool:
        """Whether the parameter holds anything but its hidden weight.

        Writing the same again, as swapping in averaged weights and back does, is no difference.
        """
        if self.layer.local._version == self._version:
            return False
        assert self.dense is not None
        hidden = self.dense.clone()
        masking.hide([hidden], [mask], beta)
        return not torch.equal(hidden, self.layer.local)

    def row(self, mask: Tensor) -> LayerRow:
        layer = self.layer
        counts = torch.tensor([mask.numel(), mask.numel() - int(mask.count_nonzero())])
        size, zeros = ranks_of(layer.weight).all_reduce(counts).tolist()
        pattern, itemsize = str(self.patterns[-1]), layer.weight.element_size()
        return LayerRow(layer.name, layer.kind, layer.shape, pattern, size, zeros, itemsize, None)
