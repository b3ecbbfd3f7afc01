"""The table of methods. A new pruner is one row here, and passes the whole battery."""

from typing import NamedTuple

from prunus import ALPS, CAP, OBS, RI, RIA, FastCAP, Magnitude, SparseGPT, Wanda
from prunus.pruners import Pruner


class Case(NamedTuple):
    pruner: Pruner
    needs_data: bool
    patterns: tuple[str, ...]


PRUNERS = {
    "magnitude": Case(
        Magnitude(),
        False,
        ("unstructured", "row", "2:4", "1:4", "2:4 along outputs", "4x1", "1x4"),
    ),
    "obs": Case(OBS(block_size=8), True, ("unstructured", "row", "2:4", "1:4", "4x1", "1x4")),
    "cap": Case(CAP(block_size=8, damp=1e-6), True, ("unstructured", "row", "2:4", "1:4")),
    "wanda": Case(Wanda(), True, ("unstructured", "row", "2:4", "1:4", "4x1", "1x4")),
    "wanda-refit": Case(Wanda(swap=True, refit=True), True, ("unstructured", "row", "2:4", "1:4")),
    "ri": Case(RI(), False, ("unstructured", "row", "2:4", "1:4", "4x1", "1x4")),
    "ria": Case(RIA(), True, ("unstructured", "row", "2:4", "1:4", "4x1", "1x4")),
    "sparsegpt": Case(SparseGPT(), True, ("unstructured", "row", "2:4", "1:4")),
    "sparsegpt-refit": Case(SparseGPT(refit=True), True, ("unstructured", "row", "2:4", "1:4")),
    "alps": Case(ALPS(), True, ("unstructured", "row", "2:4", "1:4")),
    "fastcap": Case(FastCAP(), True, ("unstructured", "2:4", "1:4")),
}
