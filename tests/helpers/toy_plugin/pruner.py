"""Magnitudes times the standard deviations of the inputs, with a statistic of its own."""

from dataclasses import dataclass

import torch

import prunus


@prunus.register_statistic
class InputStd(prunus.Statistic):
    """Sum, sum of squares and number of a layer's inputs."""

    name = "toy_std"

    def __init__(self, columns):
        self.sums = torch.zeros(3, columns, dtype=torch.float64)

    def update(self, x):
        x = x.double().cpu()
        self.sums += torch.stack([x.sum(0), x.square().sum(0), torch.full_like(x[0], len(x))])

    def tensors(self):
        return [self.sums]


@prunus.register_pruner
@dataclass(frozen=True)
class Std(prunus.ScorePruner):
    """Score ``|w| * std(x)``."""

    name = "toy_std"

    def statistic(self, layer):
        return InputStd(layer.matrix_shape()[1])

    def scores(self, w, stat, pattern, ranks):
        total, squares, count = stat.sums
        return w.abs() * (squares / count - (total / count) ** 2).clamp(min=0).sqrt().to(w)
