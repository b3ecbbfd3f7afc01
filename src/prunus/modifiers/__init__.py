"""What a recipe may contain, one file each."""

from prunus.modifiers.acdc import ACDC
from prunus.modifiers.base import (
    MODIFIERS,
    Context,
    Modifier,
    OneShotModifier,
    Run,
    register_modifier,
)
from prunus.modifiers.freeze import Freeze
from prunus.modifiers.keep import Keep
from prunus.modifiers.movement import MovementPruning
from prunus.modifiers.nm.modifier import NMTraining
from prunus.modifiers.optimizer_groups import LearningRate, WeightDecay
from prunus.modifiers.prune import PruningModifier
from prunus.modifiers.semi_sparse import SemiSparseTraining
from prunus.modifiers.sparse_activations import SparseActivations

__all__ = [
    "ACDC",
    "MODIFIERS",
    "Context",
    "Freeze",
    "Keep",
    "LearningRate",
    "Modifier",
    "MovementPruning",
    "NMTraining",
    "OneShotModifier",
    "PruningModifier",
    "Run",
    "SemiSparseTraining",
    "SparseActivations",
    "WeightDecay",
    "register_modifier",
]
