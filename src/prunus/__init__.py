"""prunus prunes PyTorch models by recipe, during training or in one shot."""

from prunus.accelerating import Accelerated, accelerate
from prunus.block_walk import Sequential
from prunus.calibration import Calibration
from prunus.channels import channels, drop_blocks, shrink
from prunus.checkpoint import load, save
from prunus.curvature import Fisher, fisher
from prunus.modifiers import PruningModifier
from prunus.oneshot import prune, sweep
from prunus.permuting import Permute
from prunus.pruners import (
    ALPS,
    CAP,
    OBS,
    RI,
    RIA,
    FastCAP,
    Magnitude,
    SparseGPT,
    Wanda,
    list_pruners,
    register_pruner,
)
from prunus.recipe import Recipe
from prunus.results import sparsity
from prunus.session import Session, attach

__version__ = "0.1.0"
__all__ = [
    "ALPS",
    "CAP",
    "OBS",
    "RI",
    "RIA",
    "Accelerated",
    "Calibration",
    "FastCAP",
    "Fisher",
    "Magnitude",
    "Permute",
    "PruningModifier",
    "Recipe",
    "Sequential",
    "Session",
    "SparseGPT",
    "Wanda",
    "accelerate",
    "attach",
    "channels",
    "drop_blocks",
    "fisher",
    "list_pruners",
    "load",
    "prune",
    "register_pruner",
    "save",
    "shrink",
    "sparsity",
    "sweep",
]
