"""The arithmetic of `scaling`: bytes, traffic and operations of a pruning step, from its plan."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

import prunus
from prunus.calibration.measurements import needs_of
from prunus.calibration.memory_plan import plan
from prunus.core.selection import select
from prunus.pruners import JointPruner, Pruner
from prunus.stats import InputGram

HISTOGRAM = 65536 * 8  # of one ranking, for each 16 bits of a score
SHARED = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
"""layers of a Llama that read what another reads"""
SPARSITY = 0.5
STRIPE = 128  # columns that a sweep ranks together


def methods(num_grads: int) -> dict[str, Pruner]:
    second = {f"CAP, B={b}": prunus.CAP(block_size=b, num_grads=num_grads) for b in (192, 64, 16)}
    return {
        "magnitude": prunus.Magnitude(),
        "Wanda": prunus.Wanda(),
        "SparseGPT": prunus.SparseGPT(),
        "FastCAP": prunus.FastCAP(num_grads=min(256, num_grads)),
        "OBS, B=192": prunus.OBS(block_size=192, num_grads=num_grads),
        **second,
    }


class Costs:
    """The arithmetic of one method on one model."""

    def __init__(self, pruner: Pruner, model: nn.Module, tokens: int, sequential: bool) -> None:
        stat = pruner.statistic(select(model).layers[0])
        self.reads = "" if stat is None else stat.reads
        self.by_block = sequential and self.reads == "inputs"
        modifier = prunus.PruningModifier(pruner, SPARSITY, sequential=self.by_block)
        self.plan = modifier.plan(model, prunus.Calibration((), memory=1 << 62))
        self.layers, self.stats = self.plan.layers, self.plan.measurements().stats
        self.tokens, self.pruner = tokens, pruner
        self.weights = sum(math.prod(layer.shape) for layer in self.layers)

    @property
    def num_grads(self) -> int:
        return int(getattr(self.pruner, "num_grads", 0))

    @property
    def by_rows(self) -> bool:
        return any(stat.by_rows for stat in self.stats.values())

    def most_rows(self, ranks: int) -> dict[Any, int]:
        return {layer: -(-layer.matrix_shape()[0] // ranks) for layer in self.layers}

    def statistics(self, ranks: int = 1) -> int:
        """Bytes on each rank, at most, if all are held together (of one block, block by block)."""
        if self.by_block:
            return self.plan.memory()["statistics"]
        return sum(need.nbytes for need in needs_of(self.stats, self.most_rows(ranks)))

    def readings(self, ranks: int, budget: int) -> int:
        """Of the calibration data in a pruning step, as `PruningPlan.passes` counts them."""
        if self.by_block or not self.stats:
            return min(1, len(self.stats))
        groups = len(plan(needs_of(self.stats, self.most_rows(ranks)), budget))
        return groups if isinstance(self.pruner, JointPruner) else 2 * groups - 1

    def sent(self, ranks: int, how: str, itemsize: int) -> float:
        """Bytes that leave each rank in a pruning step, where all-reduces go round in a ring.

        Not a number where that is refused: block by block under FSDP2.
        """
        if self.by_block and how == "fsdp":
            return math.nan
        reduced = sum(stat.nbytes for layer, stat in self.stats.items() if self._leads(layer))
        reduced = 0 if self.by_rows else reduced
        ranked = how == "fsdp" or self.by_rows
        ranking = HISTOGRAM * (2 if self.stats else itemsize // 2)  # magnitudes are as weights are
        if ranked and isinstance(self.pruner, JointPruner):
            reduced += ranking * sum(-(-layer.matrix_shape()[1] // STRIPE) for layer in self.layers)
        elif ranked:
            pooled = self.pruner.allocator == "global"
            reduced += ranking * (len(self.layers) + pooled)
        exchanged = 0
        if self.by_rows and how == "ddp":
            exchanged = 4 * self.weights * -(-self.num_grads // ranks)
            reduced += self.weights * (itemsize + 1)
        return (exchanged + 2 * reduced) * (ranks - 1) / ranks

    def _leads(self, layer: Any) -> bool:
        return self.reads != "inputs" or layer.name.split(".")[-1] not in SHARED

    def measuring(self, batches: int) -> float:
        """Floating-point operations: one reading of the data through the model, and the sums."""
        if not self.stats:
            return 0.0
        if self.reads == "inputs":
            each = [
                2.0 * layer.matrix_shape()[1] ** (2 if isinstance(stat, InputGram) else 1)
                for layer, stat in self.stats.items()
                if self._leads(layer)
            ]
            return batches * self.tokens * (2.0 * self.weights * (1 + self.by_block) + sum(each))
        products = sum(
            2.0 * math.prod(layer.shape) * stat.block_size for layer, stat in self.stats.items()
        )
        return self.num_grads * (6.0 * self.weights * self.tokens + products)

    def solving(self) -> float:
        """Floating-point operations from statistics to weights, in leading order."""
        total = 0.0
        for layer, stat in self.stats.items():
            (rows, cols), d = layer.matrix_shape(), getattr(stat, "block_size", 0)
            if isinstance(self.pruner, JointPruner):
                total += rows * cols**2 + self._leads(layer) * cols**3 * 2 / 3
            elif self.by_rows:  # of d^3: an inverse 8/3, an elimination 2, a solve of what is kept
                cap = 8 / 3 + 2 + (1 - SPARSITY) ** 3 / 3
                times = cap if isinstance(self.pruner, prunus.CAP) else 2 * 8 / 3
                total += times * math.prod(layer.shape) * d**2
        return total
