"""Running pruned weights in forms that skip their zeros."""

from prunus.execution.choice import DENSE, Chooser, LayerExecution
from prunus.execution.modules import Sparse, become_dense, become_sparse, restore
from prunus.execution.stopwatch import timings
from prunus.execution.targets import input_rows, targets

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
