"""What scripts ask a manager about its recipe."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from prunus.modifiers import Keep, LearningRate, Modifier, PruningModifier
from prunus.modifiers.schedules import Schedule
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
    def modifiers(self) -> list[Any]:
        """The recipe's modifiers; scripts may set the sparsities of those that prune."""
        return [
            PruningView(self, i) if isinstance(m, PruningModifier) else m
            for i, m in enumerate(self.recipe.modifiers)
        ]

    def iter_modifiers(self) -> Iterator[Any]:
        yield from self.modifiers

    @property
    def epoch_modifiers(self) -> list[Recipe]:
        """The recipe, if it sets the length of training: what matters is whether there is one."""
        return [] if self.recipe.epochs is None else [self.recipe]

    @property
    def learning_rate_modifiers(self) -> list[Modifier]:
        return [m for m in self.recipe.modifiers if isinstance(m, LearningRate)]

    @property
    def pruning_modifiers(self) -> list[Any]:
        return [m for m in self.modifiers if isinstance(m, PruningView | Keep)]

    @property
    def quantization_modifiers(self) -> list[Modifier]:
        """None, as are the next two: such modifiers are refused when the recipe is read."""
        return []

    distillation_modifiers = structured_modifiers = quantization_modifiers

    def qat_active(self, epoch: float) -> bool:
        return False


@dataclass
class PruningView:
    """A pruning modifier of a manager; ``init_sparsity`` and ``final_sparsity`` can be set.

    Everything else is that of the `PruningModifier`. A sparsity that is constant has one value,
    under both names.
    """

    owner: RecipeView
    place: int
    """among the recipe's modifiers"""

    @property
    def modifier(self) -> PruningModifier:
        found = self.owner.recipe.modifiers[self.place]
        assert isinstance(found, PruningModifier)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.modifier, name)

    @property
    def init_sparsity(self) -> float | None:
        """None where a pattern or a table says how much."""
        schedule = self.modifier.schedule
        return None if schedule is None else schedule(0.0)

    @init_sparsity.setter
    def init_sparsity(self, value: float) -> None:
        self._set(value, from_=value)

    @property
    def final_sparsity(self) -> float | None:
        schedule = self.modifier.schedule
        return None if schedule is None else schedule.final

    @final_sparsity.setter
    def final_sparsity(self, value: float) -> None:
        self._set(value, to=value)

    def _set(self, constant: float, **end: Any) -> None:
        old, recipe = self.modifier.sparsity, self.owner.recipe
        sparsity = replace(old, **end) if isinstance(old, Schedule) else constant
        modifiers = list(recipe.modifiers)
        modifiers[self.place] = replace(self.modifier, sparsity=sparsity)
        self.owner.recipe = replace(recipe, modifiers=tuple(modifiers))
