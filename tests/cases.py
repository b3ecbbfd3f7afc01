"""The table of methods. A new pruner is one row here, and passes the whole battery."""

from typing import NamedTuple

from prunus import Magnitude
from prunus.pruners import Pruner


class Case(NamedTuple):
    pruner: Pruner
    needs_data: bool
    patterns: tuple[str, ...]


PRUNERS = {
    "magnitude": Case(Magnitude(), False, ("unstructured", "row", "2:4", "1:4", "4x1", "1x4")),
}
