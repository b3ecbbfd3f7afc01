"""Running pruned weights in forms that skip their zeros."""

from prunus.execution.inference.choice import DENSE, Chooser, LayerExecution
from prunus.execution.inference.modules import Sparse, become_dense, become_sparse, restore
from prunus.execution.inference.stopwatch import timings
from prunus.execution.inference.targets import input_rows, targets

__all__ = [
    "DENSE",
    "Chooser",
    "LayerExecution",
    "Sparse",
    "become_dense",
    "become_sparse",
    "input_rows",
    "restore",
    "targets",
    "timings",
]
