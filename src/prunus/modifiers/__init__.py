"""What a recipe may contain, one file each."""

from prunus.modifiers.acdc import ACDC
from prunus.modifiers.base import MODIFIERS, Context, Modifier, Run, register_modifier
from prunus.modifiers.freeze import Freeze
from prunus.modifiers.keep import Keep
from prunus.modifiers.movement import MovementPruning
from prunus.modifiers.nm.run import TrainingRun
from prunus.modifiers.optimizer_groups import LearningRate, WeightDecay
from prunus.modifiers.prune import PruningModifier
from prunus.modifiers.pruning_run import PruningRun, pruning_event
from prunus.modifiers.semi_sparse import Accelerate

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
    "TrainingRun",
    "WeightDecay",
    "pruning_event",
    "register_modifier",
]
