"""The nine layers of the EIE paper: shapes, densities, and what the paper reports of them.

Song Han et al., ISCA 2016, tables III and IV.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prunus.formats import Mask


@dataclass(frozen=True)
class Layer:
    """A fully connected layer; microseconds on 64 elements, ideal and with waiting."""

    name: str
    inputs: int
    outputs: int
    weights: float
    """share of weights that are not zero"""
    activations: float
    """share of input activations that are not zero"""
    ideal: float
    actual: float

    def random(self, seed: int = 0) -> tuple[Mask, Mask]:
        """Weights and activations of these densities, each there or not independently."""
        rng = np.random.default_rng(seed)
        mask = rng.random((self.outputs, self.inputs), np.float32) < self.weights
        active = np.zeros(self.inputs, np.bool_)
        active[rng.permutation(self.inputs)[: round(self.activations * self.inputs)]] = True
        return mask, active


LAYERS = (
    Layer("Alex-6", 9216, 4096, 0.09, 0.351, 28.1, 30.3),
    Layer("Alex-7", 4096, 4096, 0.09, 0.353, 11.7, 12.2),
    Layer("Alex-8", 4096, 1000, 0.25, 0.375, 8.9, 9.9),
    Layer("VGG-6", 25088, 4096, 0.04, 0.183, 28.1, 34.4),
    Layer("VGG-7", 4096, 4096, 0.04, 0.375, 7.9, 8.7),
    Layer("VGG-8", 4096, 1000, 0.23, 0.411, 7.3, 8.4),
    Layer("NT-We", 4096, 600, 0.10, 1.0, 5.2, 8.0),
    Layer("NT-Wd", 600, 8791, 0.11, 1.0, 13.0, 13.9),
    Layer("NT-LSTM", 1201, 2400, 0.10, 1.0, 6.5, 7.5),
)

SIMULATOR_CYCLES = {
    (64, 2): 10194, (64, 3): 8827, (64, 4): 8386, (64, 5): 8160, (64, 8): 7926, (64, 9): 7896,
    (64, 16): 7794, (64, 32): 7794, (8, 8): 58446, (16, 8): 30001, (32, 8): 15162,
    (128, 8): 4392, (256, 8): 2689, (4, 4): 116654,
}  # fmt: skip
"""(elements, queue) -> cycles of the authors' simulator on the layer that it comes with: AlexNet's
fc8 of 4096 inputs and 1000 outputs, 25.66 % of the weights and 42.9 % of the activations"""


def read_simulator_layer(directory: str | os.PathLike[str]) -> tuple[Mask, Mask]:
    """The layer in ``data/`` of a checkout of the authors' simulator: weights and activations.

    Each of 64 elements has a file of 32-bit pointers and one of pairs (code, zeros before it).
    That data has no licence, so that it is not part of this package.
    """
    data = Path(directory) / "data"
    active = np.fromfile(data / "act.dat", np.float32) > 0
    mask = np.zeros((1000, 4096), np.bool_)
    for element in range(64):
        pointers = np.fromfile(data / "ptr" / f"ptr{element}.dat", np.int32)[:4097]
        entries = np.fromfile(data / "spm" / f"spm{element}.dat", np.int32).reshape(-1, 2)
        entries = entries[: pointers[-1]]
        counts = pointers[1:] - pointers[:-1]
        steps = np.concatenate([[0], np.cumsum(entries[:, 1] + 1)])
        rows = steps[1:] - np.repeat(steps[pointers[:-1]], counts) - 1
        columns = np.repeat(np.arange(4096), counts)
        real = entries[:, 0] != 0
        mask[rows[real] * 64 + element, columns[real]] = True
    return mask, active[:4096]
