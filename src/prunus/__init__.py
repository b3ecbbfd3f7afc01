"""prunus prunes PyTorch models by recipe, during training or in one shot."""

from prunus import _moved
from prunus.allocators import (
    Allocation,
    Allocator,
    Problem,
    SignalAllocator,
    Unit,
    filled,
    register_allocator,
)
from prunus.api.accelerate import Accelerated, accelerate
from prunus.api.attach import attach
from prunus.api.checkpoint import load, save
from prunus.api.oneshot import prune
from prunus.api.results import sparsity
from prunus.api.session import Session
from prunus.api.sweep import sweep
from prunus.calibration.calibration import Calibration
from prunus.calibration.fisher import Fisher, fisher
from prunus.channels import channels, drop_blocks, shrink
from prunus.core.layers import Layer
from prunus.core.patterns import Pattern
from prunus.core.ranks import Ranks
from prunus.engine.permute.step import Permute
from prunus.engine.sequential.access import Sequential
from prunus.hardware import Estimate, estimate
from prunus.modifiers import (
    Context,
    Modifier,
    NMTraining,
    OneShotModifier,
    PruningModifier,
    Run,
    register_modifier,
)
from prunus.modifiers.timing import Interval, Window
from prunus.pruners import (
    ALPS,
    CAP,
    OBS,
    RI,
    RIA,
    FastCAP,
    JointPruner,
    Magnitude,
    Pruner,
    ScorePruner,
    SparseGPT,
    Wanda,
    list_pruners,
    register_pruner,
)
from prunus.recipe import Recipe
from prunus.stats import (
    BlockFisher,
    InputGram,
    InputNorm,
    Sampling,
    SharedFisher,
    Statistic,
    register_statistic,
)

_moved.install()

__version__ = "0.1.0"
__all__ = [
    "ALPS",
    "CAP",
    "OBS",
    "RI",
    "RIA",
    "Accelerated",
    "Allocation",
    "Allocator",
    "BlockFisher",
    "Calibration",
    "Context",
    "Estimate",
    "FastCAP",
    "Fisher",
    "InputGram",
    "InputNorm",
    "Interval",
    "JointPruner",
    "Layer",
    "Magnitude",
    "Modifier",
    "NMTraining",
    "OneShotModifier",
    "Pattern",
    "Permute",
    "Problem",
    "Pruner",
    "PruningModifier",
    "Ranks",
    "Recipe",
    "Run",
    "Sampling",
    "ScorePruner",
    "Sequential",
    "Session",
    "SharedFisher",
    "SignalAllocator",
    "SparseGPT",
    "Statistic",
    "Unit",
    "Wanda",
    "Window",
    "accelerate",
    "attach",
    "channels",
    "drop_blocks",
    "estimate",
    "filled",
    "fisher",
    "list_pruners",
    "load",
    "prune",
    "register_allocator",
    "register_modifier",
    "register_pruner",
    "register_statistic",
    "save",
    "shrink",
    "sparsity",
    "sweep",
]
