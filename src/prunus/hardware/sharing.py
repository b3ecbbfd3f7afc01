"""Weight sharing: the weights of a layer take one of a few values, which are then fine-tuned.

Song Han et al., "Deep Compression: Compressing Deep Neural Networks with Pruning, Trained
Quantization and Huffman Coding", ICLR 2016, https://arxiv.org/abs/1510.00149, section 3. Zero is a
value of its own, so pruned weights stay pruned, and 2^bits - 1 others come from k-means.

In fine-tuning the gradient of a shared value is the sum of its weights' gradients. It is written to
all of them before the optimizer's step, and their mean after the step is the new value: weights
that are equal and get equal gradients stay equal under any elementwise optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunus import formats
from prunus.core.layers import Layer
from prunus.core.selection import select
from prunus.hardware.kmeans import kmeans, nearest


@dataclass(eq=False)
class SharedWeight:
    """A layer's weight as codes and a codebook."""

    layer: Layer
    codes: Tensor
    """of the weight's shape; 0 is pruned"""
    size: int
    """values, zero among them"""

    def codebook(self) -> Tensor:
        """(size,) the mean of each value's weights, in double precision; 0 for zero."""
        flat = self.codes.reshape(-1)
        sums = torch.zeros(self.size, dtype=torch.float64, device=flat.device)
        sums.index_add_(0, flat, self.layer.local.reshape(-1).double())
        values = sums / torch.bincount(flat, minlength=self.size).clamp(min=1)
        values[0] = 0
        return values

    @torch.no_grad()
    def project(self) -> None:
        """Set every weight to its shared value."""
        self.layer.local.copy_(self.codebook()[self.codes])

    @torch.no_grad()
    def share_gradient(self) -> None:
        """Replace the gradient by that of the shared value, zero where pruned."""
        gradient = self.layer.weight.grad
        if gradient is None:
            return
        gradient = self.layer.part(gradient)
        sums = torch.zeros(self.size, dtype=torch.float64, device=gradient.device)
        sums.index_add_(0, self.codes.reshape(-1), gradient.reshape(-1).double())
        sums[0] = 0
        gradient.copy_(sums[self.codes])


class Sharing(Mapping[str, SharedWeight]):
    """The shared layers by name; with an optimizer, they stay shared while it trains them.

    Close it when training is done, or use it in a ``with`` statement.
    """

    def __init__(
        self, weights: Mapping[str, SharedWeight], optimizer: torch.optim.Optimizer | None
    ) -> None:
        self._weights = dict(weights)
        self._hooks: list[Any] = []
        if optimizer is not None:
            self._hooks = [
                optimizer.register_step_pre_hook(lambda *_: self.share_gradients()),
                optimizer.register_step_post_hook(lambda *_: self.project()),
            ]

    def share_gradients(self) -> None:
        """What happens before each step of the optimizer."""
        for weight in self._weights.values():
            weight.share_gradient()

    def project(self) -> None:
        """What happens after each step of the optimizer."""
        for weight in self._weights.values():
            weight.project()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> Sharing:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __getitem__(self, name: str) -> SharedWeight:
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def share_weights(
    model: nn.Module,
    bits: int = 4,
    *,
    layers: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    optimizer: torch.optim.Optimizer | None = None,
) -> Sharing:
    """Round each layer's nonzero weights to 2^bits - 1 values, found by k-means.

    With ``optimizer``, its steps from here on train the shared values. ``layers`` and ``exclude``
    are names, globs or ``re:`` regexes, as for `prunus.prune`.

    >>> import torch
    >>> from prunus import formats, hardware
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    >>> sharing = hardware.share_weights(model, bits=4, layers=["0"])
    >>> len(model[0].weight.unique())
    15
    >>> formats.encode(model[0].weight, "eie").code_bits
    4
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits={bits}; codes have 1 to 8 bits")
    chosen = select(model, layers, exclude).layers
    if optimizer is not None:
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        foreign = [layer.name for layer in chosen if id(layer.weight) not in trained]
        if foreign:
            raise ValueError(
                f"the optimizer does not train {', '.join(foreign)}; pass the one that does, or "
                "exclude them"
            )
    weights = {layer.name: _share(layer, bits) for layer in chosen}
    for weight in weights.values():
        weight.project()
    return Sharing(weights, optimizer)


def _share(layer: Layer, bits: int) -> SharedWeight:
    weight = layer.local
    values = weight.double().cpu().numpy()
    kept = values != 0
    centroids = kmeans(values[kept], (1 << bits) - 1)
    codes = np.zeros(values.shape, np.int64)
    if len(centroids):
        codes[kept] = nearest(values[kept], centroids) + 1
    return SharedWeight(layer, torch.from_numpy(codes).to(weight.device), len(centroids) + 1)


@dataclass(frozen=True)
class CompressedSize:
    """Bits of a layer after each stage of deep compression."""

    dense: int
    pruned: int
    """values in full, and relative indices"""
    shared: int
    """codes, relative indices and a codebook"""
    huffman: int
    """codes and relative indices Huffman coded, with their tables, and a codebook"""


def compressed_size(weight: Tensor, code_bits: int = 4, index_bits: int = 5) -> CompressedSize:
    """The sizes of a weight that is pruned and shared, as one stream of rows without pointers.

    Raises ValueError if it has more values than codes.
    """
    matrix = weight.detach().flatten(1).T
    stored = formats.EIE.encode(
        matrix, 1, code_bits=code_bits, index_bits=index_bits, reset="stream"
    )
    codes, zeros = stored.entries()
    codebook = stored.parts()["codebook"]
    value = 8 * weight.dtype.itemsize
    streams = ((codes, 1 << code_bits), (zeros, 1 << index_bits))
    huffman = sum(formats.huffman_bits(np.bincount(s, minlength=n)) for s, n in streams)
    return CompressedSize(
        weight.numel() * value,
        stored.count * (value + index_bits),
        stored.count * (code_bits + index_bits) + codebook,
        huffman + codebook,
    )
