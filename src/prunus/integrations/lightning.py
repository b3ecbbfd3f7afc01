"""`PrunusCallback` for Lightning, under either of its names (lightning, pytorch_lightning)."""

from __future__ import annotations

import os
from typing import Any, Literal

import torch

try:
    import lightning.pytorch as pl
except ModuleNotFoundError:
    try:
        import pytorch_lightning as pl
    except ModuleNotFoundError as error:
        message = f"{error}; this callback needs: pip install 'prunus[lightning]'"
        raise ModuleNotFoundError(message, name=error.name) from None

from prunus.api.attach import attach
from prunus.api.optimizer_hooks import innermost
from prunus.api.session import Session
from prunus.calibration.calibration import Calibration
from prunus.recipe import Recipe
from prunus.report.records import Sink


class PrunusCallback(pl.Callback):  # type: ignore[misc]
    """Prune by recipe in a Lightning ``Trainer``.

    ``Trainer(..., callbacks=[PrunusCallback("recipe.yaml")])``. The length of training comes from
    the Trainer; ``recipe``, ``calibration``, ``output_dir`` and ``log`` are as in `attach`. If the
    module has several optimizers, ``optimizer`` is the number of the one that trains the weights
    to prune; each is then taken to step once a batch.

    The state is part of Lightning's checkpoints: ``trainer.fit(..., ckpt_path=...)`` resumes.
    """

    def __init__(
        self,
        recipe: str | os.PathLike[str] | Recipe,
        *,
        calibration: Calibration | None = None,
        output_dir: str | os.PathLike[str] | None = None,
        log: Literal["wandb", "tensorboard"] | Sink | None = None,
        optimizer: int | None = None,
    ) -> None:
        self.recipe, self.calibration = recipe, calibration
        self.output_dir, self.sink, self.index = output_dir, log, optimizer
        self.session: Session | None = None
        """of the present or latest training; None before the first"""
        self._saved: dict[str, Any] | None = None

    @property
    def state_key(self) -> str:
        """Tells the states of several callbacks in one checkpoint apart."""
        return str(self._generate_state_key(optimizer=self.index))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Before a checkpoint is read: forget one that an earlier call has read."""
        self._saved = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach, and load the state if the Trainer has resumed."""
        optimizer = _choose(trainer.optimizers, self.index)
        steps_per_epoch, epochs = _length(trainer)
        self.session = attach(
            pl_module,
            optimizer,
            self.recipe,
            steps_per_epoch=steps_per_epoch,
            epochs=epochs,
            calibration=self.calibration,
            output_dir=self.output_dir,
            log=self.sink,
        )
        if self._saved is not None:
            self.session.load_state_dict(self._saved)
            self._saved = None

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the metrics of the epoch."""
        if self.session is not None and trainer.callback_metrics:
            self.session.log(**trainer.callback_metrics)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do the pruning that is still due, and remove the hooks."""
        if self.session is not None:
            self.session.close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Remove the hooks as they are."""
        if self.session is not None:
            self.session.close(finish=False)

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoint."""
        return {} if self.session is None else self.session.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts, when there is a session to load it."""
        self._saved = state_dict


def _choose(optimizers: list[torch.optim.Optimizer], index: int | None) -> torch.optim.Optimizer:
    count = len(optimizers)
    if index is None and count != 1:
        raise ValueError(
            f"the module has {count} optimizers; say which trains the weights to prune, such as "
            "PrunusCallback(..., optimizer=0)"
        )
    if index is not None and not 0 <= index < count:
        raise ValueError(f"optimizer={index}: the module has {count}, numbered from 0")
    return innermost(optimizers[index or 0])


def _length(trainer: pl.Trainer) -> tuple[int | None, float | None]:
    """Optimizer steps in an epoch, and epochs; None for what the Trainer does not know."""
    batches, limits = trainer.num_training_batches, []
    if trainer.max_steps != -1:  # it counts the steps of all optimizers together
        limits.append(trainer.max_steps // len(trainer.optimizers))
    if batches == float("inf"):  # an iterable data set: one epoch is all of training
        return (limits[0], 1.0) if limits else (None, None)
    steps_per_epoch = max(1, -(-int(batches) // int(trainer.accumulate_grad_batches)))
    if trainer.max_epochs != -1:
        limits.append(steps_per_epoch * trainer.max_epochs)
    return steps_per_epoch, min(limits) / steps_per_epoch if limits else None
