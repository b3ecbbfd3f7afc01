"""prunus prunes PyTorch models by recipe, during training or in one shot."""

from prunus import _moved
from prunus.api.accelerate import Accelerated, accelerate
from prunus.api.attach import attach
from prunus.api.checkpoint import load, save
from prunus.api.oneshot import prune
from prunus.api.results import sparsity
from prunus.api.session import Session
from prunus.api.sweep import sweep
from prunus.calibration.calibration import Calibration
from prunus.calibration.fisher import Fisher, fisher
from prunus.engine.permute.step import Permute
from prunus.engine.sequential.walk import Sequential
from prunus.modifiers import NMTraining, PruningModifier
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

_moved.install()

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
    "NMTraining",
    "Permute",
    "PruningModifier",
    "Recipe",
    "Sequential",
    "Session",
    "SparseGPT",
    "Wanda",
    "accelerate",
    "attach",
    "fisher",
    "list_pruners",
    "load",
    "prune",
    "register_pruner",
    "save",
    "sparsity",
    "sweep",
]
