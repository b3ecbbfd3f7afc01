"""Pruning during training: `attach` hooks a recipe onto an optimizer and returns a `Session`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from prunus.api.arguments import check_same_on_all_ranks
from prunus.api.session import Session
from prunus.calibration.calibration import Calibration
from prunus.core.files import check_writable
from prunus.core.numbers import count
from prunus.core.ranks import all_ranks
from prunus.modifiers.timing import Timeline
from prunus.recipe import Recipe
from prunus.report.records import FILE, Recorder, Sink, is_main


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe: str | os.PathLike[str] | Recipe,
    *,
    steps_per_epoch: int | None = None,
    epochs: float | None = None,
    gradient_accumulation_steps: int = 1,
    calibration: Calibration | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    log: Literal["wandb", "tensorboard"] | Sink | None = None,
) -> Session:
    """Hook a recipe onto an optimizer. The training loop stays as it is.

    ``steps_per_epoch`` counts batches and is divided (rounding up) by
    ``gradient_accumulation_steps``; both it and ``epochs`` (default: the recipe's) are needed only
    by recipes that count in epochs or shares of training. ``calibration`` is tried on its first
    batch where the recipe will need it; an iterable of batches will do. ``output_dir`` receives
    ``records.jsonl`` as training goes; ``log`` also passes events to Weights & Biases, TensorBoard
    or a function.

    Raises ValueError (RecipeError for the recipe's own faults) with the remedy if something does
    not fit, or data-parallel ranks were given different recipes, lengths or kinds of calibration;
    the model, the optimizer and the loop are then untouched, on all ranks.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> recipe = "modifiers: [{prune: {sparsity: {from: 0.25, to: 0.5}, window: {every: 1step}}}]"
    >>> with prunus.attach(model, optimizer, recipe, steps_per_epoch=4, epochs=1):
    ...     for _ in range(4):
    ...         model(torch.randn(4, 8)).square().mean().backward()
    ...         optimizer.step()
    >>> prunus.sparsity(model)["0"]
    0.5
    """
    with all_ranks().raise_on_all_ranks():
        loaded, timeline = _read(
            recipe, steps_per_epoch, epochs, gradient_accumulation_steps, output_dir
        )
    check_same_on_all_ranks(calibration, recipe=loaded.to_yaml(), timeline=timeline)
    return Session(model, optimizer, loaded, timeline, calibration, Recorder(output_dir, log))


def _read(
    recipe: str | os.PathLike[str] | Recipe,
    steps_per_epoch: int | None,
    epochs: float | None,
    gradient_accumulation_steps: int,
    output_dir: str | os.PathLike[str] | None,
) -> tuple[Recipe, Timeline]:
    """The recipe, and how long training is. Raises ValueError, and OSError for the folder."""
    accumulation = count("gradient_accumulation_steps", gradient_accumulation_steps)
    if steps_per_epoch is not None:
        steps_per_epoch = -(-count("steps_per_epoch", steps_per_epoch) // accumulation)
    loaded = Recipe.load(recipe)
    if output_dir is not None and is_main():
        check_writable(Path(output_dir) / FILE)
    return loaded, Timeline(steps_per_epoch, loaded.epochs if epochs is None else epochs)
