"""AlphaPruning: layers with heavier-tailed spectra stay denser.

H. Lu, Y. Zhou, S. Liu, Z. Wang, M. W. Mahoney, Y. Yang, "AlphaPruning: using heavy-tailed
self-regularization theory for improved layer-wise pruning of large language models", 2024,
https://arxiv.org/abs/2410.10912, section 3.

Here the total is met exactly, whatever the sizes of the layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from prunus.allocators.base import (
    Allocation,
    Problem,
    SignalAllocator,
    filled,
    places,
    register_allocator,
)

BINS = 100  # of the histogram whose peak is where the tail begins


def tail_exponent(w: Tensor) -> float:
    """The exponent of the power law that the largest eigenvalues of ``W^T W`` follow (Hill, 1975).

    ``1 + k / sum_i ln(l_i / l_min)`` over the k eigenvalues above l_min, the peak of their density
    on a logarithmic scale ("fix-finger").
    """
    eigenvalues = torch.linalg.svdvals(w.double()).square().sort().values
    logs = eigenvalues[eigenvalues > eigenvalues[-1] * 1e-12].log()
    if len(logs) < 2 or logs[0] == logs[-1]:
        return 1.0
    counts = torch.histc(logs, BINS, float(logs[0]), float(logs[-1]))
    peak = logs[0] + (logs[-1] - logs[0]) * int(counts.argmax()) / BINS
    tail = logs[logs >= peak]
    begin = min(len(logs) - len(tail), len(logs) - 2)
    tail = logs[begin:]
    return 1 + (len(tail) - 1) / float((tail - tail[0]).sum())


@register_allocator
@dataclass(frozen=True)
class AlphaPruning(SignalAllocator):
    """Sparsity from ``1 - spread`` of the target, for the lowest exponent, to ``1 + spread`` of it.

    The exponent is that of the spectra's tails, the mean over a block's layers. Needs no data.
    """

    name: ClassVar[str] = "alphapruning"

    spread: float = 0.2
    """how far a block's sparsity may be from the target, relative to it (tau)"""

    def __post_init__(self) -> None:
        if not 0 <= self.spread < 1:
            raise ValueError(f"spread={self.spread} is not within [0, 1)")

    def signal(self, block: Sequence[tuple[Tensor, Any]]) -> float:
        """The mean exponent of the block's layers."""
        return sum(tail_exponent(w) for w, _ in block) / len(block)

    def allocate(self, problem: Problem) -> Allocation:
        return filled(problem, [1 + self.spread * (2 * x - 1) for x in places(problem)])
