"""What a recipe may contain, one file each."""

from prunus.modifiers.accelerate import Accelerate
from prunus.modifiers.acdc import ACDC
from prunus.modifiers.base import MODIFIERS, Context, Modifier, Run
from prunus.modifiers.freeze import Freeze
from prunus.modifiers.keep import Keep
from prunus.modifiers.movement import MovementPruning
from prunus.modifiers.param_groups import LearningRate, WeightDecay
from prunus.modifiers.prune import PruningModifier
from prunus.modifiers.pruning_run import PruningRun, pruning_event
from prunus.modifiers.sparse_activations import SparseActivations
from prunus.modifiers.training_run import TrainingRun

__all__ = [
    "ACDC",
    "MODIFIERS",
    "Accelerate",
    "Context",
    "Freeze",
    "Keep",
    "LearningRate",
    "Modifier",
    "MovementPruning",
    "PruningModifier",
    "PruningRun",
    "Run",
    "SparseActivations",
    "TrainingRun",
    "WeightDecay",
    "pruning_event",
]
