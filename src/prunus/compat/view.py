"""What scripts ask a manager about its recipe."""

from __future__ import annotations

import math
from collections.abc import Iterator

from prunus.modifiers import Keep, LearningRate, Modifier, PruningModifier
from prunus.recipe import Recipe
from prunus.recipe.sparseml import Reading


class RecipeView:
    """A recipe, and the epochs of the file it was read from."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.reading: Reading | None = None
        """where the file was SparseML's or CAP's"""

    def __str__(self) -> str:
        return self.recipe.to_yaml()

    @property
    def max_epochs(self) -> int:
        """The last epoch that the recipe names, rounded up; -1 if it names none."""
        last = self.reading.max_epochs if self.reading else self.recipe.epochs or -1
        return math.ceil(last)

    @property
    def min_epochs(self) -> int:
        """The first one, rounded down."""
        return math.floor(self.reading.min_epochs) if self.reading else 0

    @property
    def modifiers(self) -> list[Modifier]:
        return list(self.recipe.modifiers)

    def iter_modifiers(self) -> Iterator[Modifier]:
        yield from self.recipe.modifiers

    @property
    def epoch_modifiers(self) -> list[Recipe]:
        """The recipe, if it sets the length of training: what matters is whether there is one."""
        return [] if self.recipe.epochs is None else [self.recipe]

    @property
    def learning_rate_modifiers(self) -> list[Modifier]:
        return [m for m in self.recipe.modifiers if isinstance(m, LearningRate)]

    @property
    def pruning_modifiers(self) -> list[Modifier]:
        return [m for m in self.recipe.modifiers if isinstance(m, PruningModifier | Keep)]

    @property
    def quantization_modifiers(self) -> list[Modifier]:
        """None, as are the next two: such modifiers are refused when the recipe is read."""
        return []

    distillation_modifiers = structured_modifiers = quantization_modifiers

    def qat_active(self, epoch: float) -> bool:
        return False
