"""The methods, one file each."""

from prunus.pruners.base import (
    PRUNERS,
    Pruner,
    ScorePruner,
    SweepPruner,
    list_pruners,
    register_pruner,
    supports,
)
from prunus.pruners.cap import CAP
from prunus.pruners.fastcap import FastCAP
from prunus.pruners.magnitude import Magnitude
from prunus.pruners.obs import OBS

__all__ = [
    "CAP",
    "OBS",
    "PRUNERS",
    "FastCAP",
    "Magnitude",
    "Pruner",
    "ScorePruner",
    "SweepPruner",
    "list_pruners",
    "register_pruner",
    "supports",
]
