"""Pruning during training: `attach` hooks a recipe onto an optimizer and returns a `Session`."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prunus.calibration.calibration import Calibration
from prunus.core.layers import clean_parameters
from prunus.core.masks import Masks, local, pack, unpack
from prunus.core.sharding import gather, scatter, whole_sparsity
from prunus.modifiers import Context, PruningRun, Run, TrainingRun
from prunus.modifiers.conflicts import check_turns, in_both
from prunus.modifiers.timing import Timeline
from prunus.recipe import Recipe
from prunus.report.records import Recorder, Sink, is_main, number, start_event

log = logging.getLogger("prunus")


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
    by recipes that count in epochs or shares of training. ``output_dir`` receives
    ``records.jsonl`` as training goes; ``log`` also passes events to Weights & Biases, TensorBoard
    or a function.

    Raises ValueError (RecipeError for the recipe's own faults) with the remedy if something does
    not fit; the model, the optimizer and the loop are then untouched.
    """
    if gradient_accumulation_steps < 1:
        raise ValueError(f"gradient_accumulation_steps={gradient_accumulation_steps}; at least 1")
    if steps_per_epoch is not None:
        steps_per_epoch = -(-steps_per_epoch // gradient_accumulation_steps)
    loaded = Recipe.load(recipe)
    timeline = Timeline(steps_per_epoch, loaded.epochs if epochs is None else epochs)
    return Session(model, optimizer, loaded, timeline, calibration, Recorder(output_dir, log))


def innermost(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that steps, inside Accelerate's and Lightning's handles."""
    inner = getattr(optimizer, "optimizer", None)
    if isinstance(inner, torch.optim.Optimizer):
        return innermost(inner)
    if not isinstance(optimizer, torch.optim.Optimizer):
        kind = type(optimizer).__name__
        raise ValueError(f"attach needs a torch.optim.Optimizer to hook, not {kind}")
    # without Optimizer.__init__ (timm's Lookahead) nobody has, and hooks are never called
    optimizer._patch_step_function()
    return optimizer


def _was_skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a fused optimizer under GradScaler has been called for a step it must skip."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)


class Session:
    """A recipe at work: hooks on the optimizer's step, the clock, the masks, the state.

    Made by `attach`. As a context manager it closes at the end, without the last pruning step if
    there was an exception.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        recipe: Recipe,
        timeline: Timeline,
        calibration: Calibration | None,
        recorder: Recorder,
    ) -> None:
        self.model, self.recipe, self.recorder = model, recipe, recorder
        self.optimizer = innermost(optimizer)
        self.step = 0
        """optimizer steps done, skipped ones not counted"""
        self.closed = False
        self._fresh = True
        self._context = Context(model, self.optimizer, timeline, calibration, Masks(), recorder)
        self.runs: list[Run] = [modifier.bind(self._context) for modifier in recipe.modifiers]
        for run in self.runs:
            run.check_data()
        self._refuse_overlap()
        try:
            for run in self.runs:
                run.on_attach()
        except BaseException:
            self.closed = True
            for run in self.runs:
                run.detach()
            raise
        plain: Any = torch.compiler.disable  # a compiled step leaves its graph for our hooks
        self._handles = [
            self.optimizer.register_step_pre_hook(plain(self._before)),
            self.optimizer.register_step_post_hook(plain(self._after)),
        ]

    def _refuse_overlap(self) -> None:
        """Raises ValueError if another open session of the optimizer prunes the same layers."""
        check_turns(self.runs)
        sessions = self.optimizer.__dict__.setdefault("_prunus_sessions", weakref.WeakSet())
        for other in sessions:
            if not other.closed and (name := in_both(self.runs, other.runs)):
                raise ValueError(
                    f"another session of this optimizer prunes {name} already (was a notebook "
                    "cell run twice?); close that one first, or put all into one recipe"
                )
        sessions.add(self)

    @property
    def masks(self) -> Masks:
        """Parameter name -> keep-mask (of this rank's part), True means kept."""
        return self._context.masks

    @property
    def sparsity(self) -> float:
        """Share that is pruned of the weights the recipe prunes by now or later (this rank's)."""
        sizes = {name: mask.numel() for name, mask in self.masks.items()}
        for run in self.runs:
            if isinstance(run, PruningRun | TrainingRun):
                sizes |= {x.parameter_name: local(x.weight).numel() for x in run.layers}
        pruned = sum(m.numel() - int(m.count_nonzero()) for m in self.masks.values())
        return pruned / sum(sizes.values()) if sizes else 0.0

    def _before(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._begin()
        for run in self.runs:
            run.before_step(self.step)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._before_update()
            return None
        wrapped = self._then_before_update(closure)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": wrapped}
        return (args[0], wrapped, *args[2:]), kwargs

    def _then_before_update(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def closed() -> Any:
            loss = closure()
            self._before_update()
            return loss

        return closed

    def _before_update(self) -> None:
        for run in self.runs:
            run.before_update(self.step)

    def _after(self, *_: Any) -> None:
        skipped = _was_skipped(self.optimizer)
        self.step += not skipped
        with torch.no_grad():
            for run in self.runs:
                (run.skipped if skipped else run.apply_masks)(self.step)
            for run in self.runs if not skipped else ():
                run.prune(self.step)
            for run in self.runs if not skipped else ():
                run.begin_window(self.step)

    def _begin(self) -> None:
        if not self._fresh:
            return
        if self.step == 0:
            for run in self.runs:
                run.start()
        self._fresh = False
        if not any(event["event"] == "start" for event in self.recorder.events):
            self.recorder(start_event(self.model, self.step, recipe=self.recipe.to_yaml()))

    def log(self, **metrics: float | Tensor) -> None:
        """Record numbers at the present step, such as ``loss=`` and ``accuracy=``.

        ``step``, ``event`` and ``time`` are the session's own; given here, they are left out.
        """
        values = {name: number(value) for name, value in metrics.items()}
        self.recorder({**values, "event": "metrics", "step": self.step})

    def project(self, model: nn.Module) -> None:
        """Zero in another model (an EMA copy, say) what is pruned in this one.

        Call it after the copy is updated, before it is used or saved. Raises ValueError if the
        copy lacks a pruned parameter; nothing is then changed.
        """
        self.masks.project(clean_parameters(model))

    def state_dict(self) -> dict[str, Any]:
        """All that resuming needs besides the model's and the optimizer's own states.

        Tensors and plain values only, so ``torch.load(weights_only=True)`` reads it. Where weights
        are sharded, every rank must call this, and gets the whole.
        """
        masks = {}
        for name, mask in self.masks.items():
            whole = gather(mask, self.masks.weight(name))
            masks[name] = {"shape": list(whole.shape), "bits": pack(whole).cpu()}
        return {
            "version": 1,
            "recipe": self.recipe.to_yaml(),
            "step": self.step,
            "masks": masks,
            "runs": [run.state_dict() for run in self.runs],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken: attach as before, load all states, train on.

        States of torch.distributed.checkpoint are loaded into the optimizer before attaching,
        because `set_optimizer_state_dict` makes an optimizer step, and the session would count it.

        Raises ValueError if the state is of another recipe or model; nothing is then changed.
        """
        masks, parameters = self._check_state(state), clean_parameters(self.model)
        self.step, self._fresh = int(state["step"]), True
        for name, mask in masks.items():
            self.masks.put(name, parameters[name], scatter(mask, parameters[name]))
        self._context.owners.clear()
        for run, part in zip(self.runs, state["runs"], strict=True):
            run.load_state_dict(part)
        self.masks.keep_only(masks)
        self.recorder.rewind(self.step)

    def _check_state(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        if missing := {"version", "recipe", "step", "masks", "runs"} - set(state):
            raise ValueError(f"this is not the state of a session: it lacks {sorted(missing)}")
        if state["version"] != 1:
            raise ValueError(f"the state has version {state['version']}; this prunus reads 1")
        recipe = self.recipe.to_yaml()
        if state["recipe"] != recipe:
            raise ValueError(
                "the state is of another recipe; resume with the recipe it was trained with.\n"
                f"--- the state's\n{state['recipe']}--- this session's\n{recipe}"
            )
        parameters = clean_parameters(self.model)
        masks = {}
        for name, packed in state["masks"].items():
            shape = tuple(packed["shape"])
            if name not in parameters or tuple(parameters[name].shape) != shape:
                raise ValueError(f"the state masks {name!r} of shape {shape}; this model has none")
            masks[name] = unpack(packed["bits"], shape)
        return masks

    def report(self, directory: str | os.PathLike[str]) -> None:
        """Write ``records.jsonl``, ``report.html`` and ``report.png`` there."""
        from prunus.report import write_report

        self.recorder.save(directory)
        if is_main():
            write_report(directory)

    def close(self, finish: bool = True) -> None:
        """Remove the hooks. With ``finish``, first do the pruning that is still due.

        A second call does nothing. Afterwards nothing keeps pruned weights at zero: close when
        training is over.
        """
        if self.closed:
            return
        try:
            if finish:
                self._finish()
        finally:
            self.closed = True
            for handle in self._handles:
                handle.remove()
            for run in self.runs:
                run.detach()
            self.recorder.close()

    def _finish(self) -> None:
        self._begin()
        last = max((run.due for run in self.runs if run.due is not None), default=0)
        if last > self.step:
            log.warning("closed at step %d of %d: pruned to the target at once", self.step, last)
        for run in sorted(self.runs, key=lambda run: run.due or 0):
            run.finish(self.step)
        sparsity = whole_sparsity(self.masks)
        self.recorder({"event": "end", "step": self.step, "sparsity": sparsity})

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self.close(finish=kind is None)
