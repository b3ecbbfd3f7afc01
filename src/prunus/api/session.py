"""A recipe at work on an optimizer: the hooks, the clock, the masks, the state."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from prunus.api.mask_guard import MaskGuard
from prunus.api.optimizer_hooks import StepHooks, innermost
from prunus.calibration.calibration import Calibration, as_calibration
from prunus.calibration.input_dependence import CONSTANT, InputDependence
from prunus.core.cut_paths import cut_message, cut_paths
from prunus.core.default_dense_layers import left_by_all
from prunus.core.mask_registry import Masks
from prunus.core.masks import packed
from prunus.core.ranks import all_ranks
from prunus.core.sharding import gather, scatter, whole_sparsity
from prunus.core.unseen import told
from prunus.core.wrappers import clean_parameters
from prunus.modifiers import Context, Run
from prunus.modifiers.conflicts import check_conflicts, in_both
from prunus.modifiers.grad_scaler import step_is_skipped
from prunus.modifiers.timing import Timeline
from prunus.recipe import Recipe
from prunus.report.records import Recorder, is_main, number, start_event

log = logging.getLogger("prunus")


def _nothing() -> None:
    pass


class Session:
    """A recipe at work: hooks on the optimizer's step, the clock, the masks, the state.

    Made by `attach`. As a context manager it closes at the end, without the last pruning step if
    there was an exception.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> session = prunus.attach(model, optimizer, "modifiers: [{prune: {sparsity: 0.5}}]")
    >>> session.close()
    >>> session.sparsity, list(session.masks)
    (0.5, ['0.weight'])
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
        self.closed = self._unfinished = False
        self._fresh = True
        data = as_calibration(calibration)
        self._context = Context(model, self.optimizer, timeline, data, Masks(), recorder)
        self._listeners: list[tuple[Callable[[], Any], Callable[[], Any]]] = []
        self._depends = InputDependence(model, data)
        self._cut = cut_paths(model)
        self.runs: list[Run] = [modifier.bind(self._context) for modifier in recipe.modifiers]
        for run in self.runs:
            with all_ranks().raise_on_all_ranks():  # ranks have data of their own
                run.check_data()
        self._guard = MaskGuard(self.runs, self.masks, self.optimizer)
        self._refuse_overlap()
        try:
            for run in self.runs:
                run.on_attach()
        except BaseException:
            self.closed = True
            for run in self.runs:
                run.detach()
            raise
        if unseen := told(model):
            log.info("%s", unseen)
        self._hooks = StepHooks(self.optimizer, self._before, self._after)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a session is hooked onto its optimizer, so it is neither copied nor pickled; keep "
            "session.state_dict(), and load it into a session attached to the other optimizer"
        )

    def _refuse_overlap(self) -> None:
        """Raises ValueError if another open session of the optimizer prunes the same layers."""
        check_conflicts(self.runs)
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
        """Share of the weights the recipe prunes, now or later, that are masked and really zero.

        Counted in the model as it is (this rank's part), so weights that were loaded or trained
        elsewhere since then count as what they are; `verify` puts masks back on.
        """
        return self._guard.sparsity()

    def verify(self, when: str = "now") -> dict[str, int]:
        """Put masks back on where weights that are pruned are not zero; a warning says where.

        Done before each pruning step, when closing and when saving. Returns how many weights of
        each parameter were off (this rank's). Raises ValueError for a layer whose weight is no
        parameter any more, as when a parametrization was added.
        """
        return self._guard.verify(when)

    def _before(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._begin()
        self._guard.rebind()
        if self._next_change(self.step + 1) == self.step + 1:
            self.verify(f"before pruning after step {self.step + 1}")
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

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        if step_is_skipped(self.optimizer) or not self._hooks.stepped:
            for run in self.runs:
                run.skipped(self.step)
            return
        self.step += 1
        with self._around_pruning(self.next_change == self.step):
            for run in self.runs:
                run.apply_masks(self.step)
            for run in self.runs:
                run.prune(self.step)
            for run in self.runs:
                run.begin_window(self.step)

    @contextmanager
    def _around_pruning(self, changes: bool) -> Iterator[None]:
        for before, _ in self._listeners if changes else ():
            before()
        if changes:
            self._depends.ask_before()
        yield
        if changes:
            self._tell_of_cuts()
        for _, after in self._listeners if changes else ():
            after()

    def _tell_of_cuts(self) -> None:
        """In the log and the records, if nothing of the input gets through any more."""
        if self._depends.lost:
            log.warning("after step %d: %s", self.step, CONSTANT)
            self.recorder({"event": "constant_output", "step": self.step})
        if cut := [name for name in cut_paths(self.model) if name not in self._cut]:
            log.warning("after step %d: %s", self.step, cut_message(cut))
            self.recorder({"event": "cut", "step": self.step, "layers": cut})
            self._cut += cut

    @property
    def next_change(self) -> int | None:
        """The next step after which other weights are pruned, maybe this one; None: none is."""
        return self._next_change(self.step)

    def _next_change(self, step: int) -> int | None:
        found = (run.next_change(step) for run in self.runs)
        return min((change for change in found if change is not None), default=None)

    def on_prune(
        self, before: Callable[[], Any] | None = None, after: Callable[[], Any] | None = None
    ) -> None:
        """Call functions around each change of what is pruned, in training and when closing.

        ``before`` runs after the optimizer's step, when weights have been trained longest; those
        that are pruned already may be off zero then (`project` puts copies right). ``after`` runs
        when the new masks are on. `step` counts the optimizer's step in both.
        """
        self._listeners.append((before or _nothing, after or _nothing))

    def _begin(self) -> None:
        if not self._fresh:
            return
        if self.step == 0:
            for run in self.runs:
                run.start()
        self._fresh = False
        if not any(event["event"] == "start" for event in self.recorder.events):
            spared = left_by_all((run.spared, run.masked_layers) for run in self.runs)
            known = {"recipe": self.recipe.to_yaml(), "left_dense": spared}
            self.recorder(start_event(self.model, self.step, **known))

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
        masks = {n: packed(gather(m, self.masks.weight(n))) for n, m in self.masks.items()}
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

        Raises ValueError if it is no state, or of another recipe or model, or the session closed;
        nothing is then changed.
        """
        from prunus.api.session_state import checked_state  # with pydantic, which takes its time

        if self.closed:
            raise ValueError("the session is closed; attach anew and load the state into that")
        parameters = clean_parameters(self.model)
        read, masks = checked_state(state, self.recipe, parameters, self.runs)
        self._guard.rebind()
        self.step, self._fresh = read.step, True
        for name, mask in masks.items():
            self.masks.load(name, parameters[name], scatter(mask, parameters[name]))
        self.masks.disown_all()
        for run, part in zip(self.runs, read.runs, strict=True):
            run.load_state_dict(part)
        self.masks.keep_only(masks)
        self.recorder.rewind(self.step)

    def report(self, directory: str | os.PathLike[str]) -> None:
        """Write ``records.jsonl``, ``report.html`` and ``report.png`` there."""
        from prunus.report import write_report

        self.recorder.save(directory)
        if is_main():
            write_report(directory)

    def close(self, finish: bool = True) -> None:
        """Remove the hooks. With ``finish``, first do the pruning that is still due.

        A second call does nothing, unless the first raised in that pruning: it is then tried
        again. Afterwards nothing keeps pruned weights at zero: close when training is over.
        """
        if self.closed and not self._unfinished:
            return
        self._unfinished = finish
        try:
            if finish:
                self._finish()
                self._unfinished = False
        finally:
            self.closed = True
            self._hooks.remove()
            for run in self.runs:
                run.detach()
            self.recorder.close()

    def _finish(self) -> None:
        self._begin()
        self.verify(f"closing after step {self.step}")
        last = max((run.due for run in self.runs if run.due is not None), default=0)
        if last > self.step:
            log.warning("closed at step %d of %d: pruned to the target at once", self.step, last)
        with self._around_pruning(any(run.due is not None for run in self.runs)):
            for run in sorted(self.runs, key=lambda run: run.due or 0):
                run.finish(self.step)
        sparsity = whole_sparsity(self.masks)
        self.recorder({"event": "end", "step": self.step, "sparsity": sparsity})

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self.close(finish=kind is None)
