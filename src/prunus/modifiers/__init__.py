"""What a recipe may contain, one file each."""

from prunus.modifiers.acdc import ACDC
from prunus.modifiers.base import MODIFIERS, Context, Modifier, Run
from prunus.modifiers.freeze import Freeze
from prunus.modifiers.hold import Hold
from prunus.modifiers.movement import MovementPruning
from prunus.modifiers.param_groups import LearningRate, WeightDecay
from prunus.modifiers.prune import PruningModifier
from prunus.modifiers.pruning_run import PruningRun, pruning_event

__all__ = [
    "ACDC",
    "MODIFIERS",
    "Context",
    "Freeze",
    "Hold",
    "LearningRate",
    "Modifier",
    "MovementPruning",
    "PruningModifier",
    "PruningRun",
    "Run",
    "WeightDecay",
    "pruning_event",
]
