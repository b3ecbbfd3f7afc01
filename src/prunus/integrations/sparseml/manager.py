"""SparseML 1.x's manager of recipes: change the import, keep the script.

from prunus.integrations.sparseml.manager import ScheduledModifierManager

manager = ScheduledModifierManager.from_yaml("old_recipe.yaml")
optimizer = manager.modify(model, optimizer, steps_per_epoch=len(loader))
...
manager.finalize(model)
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunus.api.attach import attach
from prunus.api.oneshot import prune
from prunus.api.session import Session
from prunus.calibration.calibration import Calibration
from prunus.integrations.sparseml.loggers import Loggers
from prunus.integrations.sparseml.samplers import calibration_of
from prunus.integrations.sparseml.variables import parse_variables
from prunus.integrations.sparseml.view import RecipeView
from prunus.modifiers import Modifier, PruningModifier
from prunus.recipe import Recipe
from prunus.recipe.files import parse, text_of
from prunus.recipe.sparseml import is_sparseml, log_notes, read

log = logging.getLogger("prunus")


class ScheduledModifierManager(RecipeView):
    """A recipe and what is done with it: `modify` for training, `apply` for a finished model.

    ``modifiers`` is a `Recipe` or a list of its modifiers; `from_yaml` reads files.
    """

    def __init__(
        self,
        modifiers: Recipe | Sequence[Modifier],
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(modifiers if isinstance(modifiers, Recipe) else Recipe(tuple(modifiers)))
        self.metadata = metadata
        self.session: Session | None = None
        """from `modify` on; after `finalize` it still has its records and reports"""
        self.loggers = Loggers()
        self._epoch = 0.0
        self._sampler: Mapping[str, Any] | Calibration | None = None
        self._applied = False

    @classmethod
    def from_yaml(
        cls,
        file_path: str | os.PathLike[str],
        add_modifiers: Sequence[Modifier] | None = None,
        recipe_variables: Mapping[str, Any] | str | None = None,
        metadata: Mapping[str, Any] | None = None,
        *,
        dialect: str | None = None,
        strict: bool = True,
    ) -> ScheduledModifierManager:
        """From a file or text, of SparseML's, CAP's or our own kind.

        ``recipe_variables`` are a mapping, JSON, or ``name=value,name=value``. ``dialect`` and
        ``strict`` are as in `Recipe.load`, as are the errors.
        """
        if str(file_path).startswith("zoo:"):
            raise ValueError(f"{file_path}: stubs of SparseZoo are not looked up; give a file")
        text, name = text_of(file_path)
        data, source = parse(text, name)
        variables = parse_variables(recipe_variables)
        reading = None
        if dialect is not None or is_sparseml(data):
            reading = read(data, source, dialect, strict, variables)
            log_notes(reading, source)
            recipe = Recipe(reading.modifiers, reading.epochs)
        else:
            recipe = Recipe.from_yaml(text, name, **variables)
        manager = cls(Recipe((*recipe.modifiers, *(add_modifiers or ())), recipe.epochs), metadata)
        manager.reading = reading
        return manager

    def save(self, file_path: str | os.PathLike[str], include_metadata: bool = True) -> None:
        """Write the recipe as YAML of our own kind; there is no metadata in it."""
        Path(file_path).write_text(self.recipe.to_yaml(), encoding="utf-8")

    @property
    def initialized(self) -> bool:
        return self.session is not None and not self.session.closed

    def initialize(
        self,
        module: nn.Module,
        epoch: float = 0.0,
        loggers: Any = None,
        grad_sampler: Mapping[str, Any] | Calibration | None = None,
        **_: Any,
    ) -> None:
        """Remember what `modify` is to begin with; the model is not touched before."""
        self._epoch = epoch
        self._sampler = grad_sampler or self._sampler
        if loggers is not None:
            self.initialize_loggers(loggers)

    def initialize_loggers(self, loggers: Any) -> None:
        """Who is told of pruning: anything with ``log_scalars`` or ``log_scalar``, or callables.

        Callables get the events of `Session`. A list, one alone, or a manager of loggers.
        """
        self.loggers.set(loggers)

    def modify(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        steps_per_epoch: int,
        wrap_optim: Any = None,
        epoch: float | None = None,
        allow_parallel_module: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Hook the recipe onto the optimizer, and return that same object (or ``wrap_optim``).

        ``epoch`` is where training goes on; what is zero by then stays zero. ``loggers`` and
        ``grad_sampler`` are as for `initialize`. Raises ValueError as `prunus.attach` does.
        """
        if self.initialized:
            raise ValueError("the manager is at work already; call finalize() first")
        start = self._epoch if epoch is None else epoch
        self.initialize(module, start, **kwargs)
        self.session = attach(
            module,
            optimizer,
            self.recipe,
            steps_per_epoch=steps_per_epoch,
            epochs=self.max_epochs if self.max_epochs > 0 else None,
            calibration=self._calibration(),
            log=self.loggers,
        )
        self.session.step = round(start * steps_per_epoch)
        if start > 0 or self._applied:
            _keep_zeros(self.session)
        return optimizer if wrap_optim is None else wrap_optim

    def apply(
        self,
        module: nn.Module,
        epoch: float = math.inf,
        loggers: Any = None,
        finalize: bool = True,
        **kwargs: Any,
    ) -> None:
        """Prune a finished model at once, to the final sparsities.

        Without ``finalize``, `modify` may follow, and then keeps the zeros from its first step on.
        """
        if epoch != math.inf:
            raise ValueError(f"epoch={epoch}: one-shot pruning has no epochs; leave it out")
        self.initialize(module, 0.0, loggers, **kwargs)
        if any(isinstance(m, PruningModifier) for m in self.recipe.modifiers):
            result = prune(module, self.recipe, calibration=self._calibration())
            for event in result.recorder.events:
                self.loggers(event)
        else:
            log.info("the recipe prunes nothing at once")
        self._applied = not finalize

    def apply_structure(self, module: nn.Module, epoch: float = 0.0, **_: Any) -> None:
        """Nothing: no modifier changes a model's structure, so checkpoints load as they are."""

    def loss_update(self, loss: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """The loss itself: no modifier changes it."""
        return loss

    def finalize(
        self, module: nn.Module | None = None, reset_loggers: bool = True, **_: Any
    ) -> None:
        """Do the pruning that is still due and remove the hooks; a second call does nothing."""
        self._applied = False
        try:
            if self.session is not None:
                self.session.close()
        finally:
            if reset_loggers:
                self.loggers.set(None)

    def state_dict(self) -> dict[str, Any]:
        """All that resuming needs besides the model's and the optimizer's own states."""
        return self.session.state_dict() if self.session and self.initialized else {}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """Go on where the state was taken. Raises ValueError before `modify`."""
        if self.session is None or not self.initialized:
            raise ValueError("load_state_dict needs the hooks that modify() makes; call it first")
        self.session.load_state_dict(state_dict)

    def _calibration(self) -> Calibration | None:
        pruners = [m.pruner for m in self.recipe.modifiers if isinstance(m, PruningModifier)]
        grads = [p.num_grads for p in pruners if hasattr(p, "num_grads")]
        if grads and self._sampler is None:
            raise ValueError(
                "the recipe learns from gradients; give modify() or apply() a grad_sampler, such "
                "as dict(data_loader_builder=..., loss_function=...), or a Calibration"
            )
        kwargs = self.reading.sampler if self.reading else {}
        return calibration_of(self._sampler, kwargs, max(grads, default=None))


def _keep_zeros(session: Session) -> None:
    """Mask what is zero in the layers to be pruned, before a step moves it."""
    for run in session.runs:
        if run.prunes:
            for layer in run.masked_layers:
                run.context.mask(run, layer, layer.local != 0)
