"""The methods, one file each."""

from prunus.core.ranks import Ranks
from prunus.pruners._second_order import SecondOrder
from prunus.pruners.alps import ALPS
from prunus.pruners.base import (
    PRUNERS,
    JointPruner,
    Pruner,
    ScorePruner,
    list_pruners,
    register_pruner,
    supports,
)
from prunus.pruners.cap import CAP
from prunus.pruners.fastcap import FastCAP
from prunus.pruners.magnitude import Magnitude
from prunus.pruners.obs import OBS
from prunus.pruners.ria import RI, RIA
from prunus.pruners.sparsegpt import SparseGPT
from prunus.pruners.wanda import Wanda

__all__ = [
    "ALPS",
    "CAP",
    "OBS",
    "PRUNERS",
    "RI",
    "RIA",
    "FastCAP",
    "JointPruner",
    "Magnitude",
    "Pruner",
    "Ranks",
    "ScorePruner",
    "SecondOrder",
    "SparseGPT",
    "Wanda",
    "list_pruners",
    "register_pruner",
    "supports",
]
