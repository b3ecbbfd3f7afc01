"""`PrunusCallback` for ``transformers.Trainer``.

The Trainer tells a callback neither which checkpoint it resumes from nor that training failed;
`_resumed_checkpoint` and the ``with`` statement make up for these.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any, Literal

import torch

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ModuleNotFoundError as error:
    message = f"{error}; this callback needs: pip install 'prunus[llm]'"
    raise ModuleNotFoundError(message, name=error.name) from None

from prunus.api.attach import attach
from prunus.api.session import Session
from prunus.calibration.calibration import Calibration
from prunus.core.files import atomic_write
from prunus.recipe import Recipe
from prunus.report.records import Sink

log = logging.getLogger("prunus")
FILE = "prunus.pt"


class PrunusCallback(TrainerCallback):  # type: ignore[misc]
    """Prune by recipe in a `transformers.Trainer`.

    ``Trainer(..., callbacks=[PrunusCallback("recipe.yaml")])``. The length of training comes from
    the Trainer (with a data set of unknown length, one epoch is all of training, as the Trainer
    counts it too); ``recipe``, ``calibration``, ``output_dir`` and ``log`` are as in `attach`.

    The state is saved in each checkpoint as ``prunus.pt`` and read when the Trainer resumes;
    ``resume_from`` names the checkpoint, if it is not in the Trainer's own output directory.
    As a context manager around ``trainer.train()`` it removes the hooks after an exception.
    """

    def __init__(
        self,
        recipe: str | os.PathLike[str] | Recipe,
        *,
        calibration: Calibration | None = None,
        output_dir: str | os.PathLike[str] | None = None,
        log: Literal["wandb", "tensorboard"] | Sink | None = None,
        resume_from: str | os.PathLike[str] | None = None,
    ) -> None:
        self.recipe, self.calibration = recipe, calibration
        self.output_dir, self.sink, self.resume_from = output_dir, log, resume_from
        self.session: Session | None = None
        """of the present or latest training; None before the first"""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach, and load the state if the Trainer has resumed."""
        self.close()  # of a training that failed; the Trainer keeps its optimizer
        saved = self._saved_state(args, state) if state.global_step else None
        steps_per_epoch = _steps_per_epoch(args, state, kwargs.get("train_dataloader"))
        self.session = attach(
            kwargs["model"],
            kwargs["optimizer"],
            self.recipe,
            steps_per_epoch=steps_per_epoch,
            epochs=state.max_steps / steps_per_epoch,
            calibration=self.calibration,
            output_dir=self.output_dir,
            log=self.sink,
        )
        if saved is not None:
            with self:
                self.session.load_state_dict(saved)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Record the numbers that the Trainer logs, those of an evaluation among them."""
        numbers = {k: v for k, v in (logs or {}).items() if isinstance(v, int | float)}
        if self.session is not None and numbers:
            self.session.log(**numbers)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save the state beside the Trainer's own."""
        if self.session is None or state.is_hyper_param_search:
            return  # a search saves in directories of its own and does not resume
        saved = self.session.state_dict()  # on every rank: sharded masks are gathered
        if args.should_save:
            with atomic_write(_own_checkpoint(args, state) / FILE) as draft:
                torch.save(saved, draft)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Do the pruning that is still due, and remove the hooks."""
        if self.session is None:
            return
        if args.load_best_model_at_end:
            _mask_best(self.session)
        self.session.close()

    def close(self) -> None:
        """Remove the hooks as they are, without the pruning that is still due."""
        if self.session is not None:
            self.session.close(finish=False)

    def __enter__(self) -> PrunusCallback:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is not None:
            self.close()

    def _saved_state(self, args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
        places = [args.resume_from_checkpoint or "", _own_checkpoint(args, state)]
        places = places if self.resume_from is None else [self.resume_from]
        for place in map(Path, places):
            if (place / FILE).is_file() and _is_of(place, state):
                saved: dict[str, Any] = torch.load(
                    place / FILE, map_location="cpu", weights_only=True
                )
                return saved
        raise ValueError(
            f"training resumes at step {state.global_step}, but '{places[-1]}' has no {FILE} of "
            "that run; name the checkpoint: PrunusCallback(..., resume_from='.../checkpoint-500')"
        )


def _own_checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _is_of(checkpoint: Path, state: TrainerState) -> bool:
    """Whether the Trainer's state was read from there: another run logged other numbers."""
    path = checkpoint / "trainer_state.json"
    if not path.is_file():
        return False
    there = json.loads(path.read_text(encoding="utf-8"))
    # as text, in which NaN equals NaN
    return there["global_step"] == state.global_step and json.dumps(
        there["log_history"], sort_keys=True
    ) == json.dumps(state.log_history, sort_keys=True)


def _steps_per_epoch(args: TrainingArguments, state: TrainerState, loader: Any) -> int:
    """Optimizer steps in an epoch, as the Trainer counts them."""
    try:
        batches = len(loader)
    except TypeError:  # what an iterable data set raises; the Trainer then needs max_steps
        return int(state.max_steps)
    return max(1, -(-batches // int(args.gradient_accumulation_steps)))


def _mask_best(session: Session) -> None:
    """Apply the masks to the best checkpoint, which may be from before the last of them."""
    weights, masks = session.masks.parts(session.masks)
    if any(bool(w[~m].any()) for w, m in zip(weights, masks, strict=True)):
        log.warning(
            "the best checkpoint is from before the last pruning step, and was pruned without "
            "training afterwards; consider load_best_model_at_end=False"
        )
        session.project(session.model)
