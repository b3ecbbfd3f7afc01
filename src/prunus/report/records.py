"""Events of a run: kept in memory, streamed to ``records.jsonl``, passed on to loggers.

Each is a mapping with ``event``, ``step`` (optimizer steps done) and ``time``:

- ``start``: ``bytes`` and ``parameters`` of the whole model, ``unseen``, ``recipe``
- ``prune``: ``pruner``, ``pattern``, ``target``, ``sparsity`` of its layers together, and three
  mappings of their names: ``layers`` to sparsity, ``sizes`` to weights, ``saved`` to bytes
- ``dense``: how many ``layers`` AC/DC has freed
- ``sweep``: the same as for ``prune``, and ``values``, what the evaluation said
- ``metrics``: what `Session.log` was given
- ``flips``: ``flip_rate`` and ``layers``, shares of the mask entries that changed in 2:4 training
- ``execution``: ``layers``, what `prunus.accelerate` measured of each, and ``machine``, where
- ``cut``: the ``layers`` that nothing of the input passes any more
- ``constant_output``: the output has ceased to depend on the input
- ``end``: ``sparsity``

NaN and infinities stand in the file as text (``"NaN"``), because JSON has no word for them.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from prunus.core.files import atomic_write
from prunus.core.names import did_you_mean
from prunus.core.unseen import told
from prunus.report.lines import Event, from_line, to_line

log = logging.getLogger("prunus")
Sink = Callable[[Event], None]
FILE = "records.jsonl"


def read_records(directory: str | os.PathLike[str]) -> list[Event]:
    """The events of a run; lines that crashes cut short are not among them.

    Of those before the last a warning in the log tells the number. Raises FileNotFoundError if the
    directory has none, ValueError if no line of the file is a record.
    """
    path = Path(directory) / FILE
    if not path.is_file():
        raise FileNotFoundError(f"no {FILE} in '{directory}'; is it the directory of a run?")
    *lines, last = path.read_text(encoding="utf-8", errors="replace").split("\n")
    numbered = [(i, line) for i, line in enumerate(lines, 1) if line.strip()]
    events = []
    for i, line in numbered:
        try:
            events.append(from_line(line))
        except (ValueError, RecursionError):
            log.warning("%s:%d: this line is not a record; it is left out", path, i)
    if numbered and not events:
        raise ValueError(f"{path}: no line of this file is a record")
    with suppress(ValueError, RecursionError):
        events.append(from_line(last))
    return events


def start_event(model: nn.Module, step: int, **more: Any) -> Event:
    """What records and reports know of a model before it is pruned."""
    weights = list(model.parameters())
    unseen = told(model)
    return {
        "event": "start",
        "step": step,
        "bytes": sum(w.numel() * w.element_size() for w in weights),
        "parameters": sum(w.numel() for w in weights),
        **({"unseen": unseen} if unseen else {}),
        **more,
    }


def is_main() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def number(value: Any) -> float:
    """A float of what people log: a number, or a tensor of one, with or without gradient."""
    try:
        return float(value.detach() if hasattr(value, "detach") else value)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf if value > 0 else -math.inf


def _numbers(event: Event) -> dict[str, float]:
    """What a chart can show of an event."""
    skip = ("step", "event", "time")
    return {k: v for k, v in event.items() if k not in skip and isinstance(v, (int, float))}


class _Wandb:
    """Logs to the run that is open, or to one of its own, which ends with the session."""

    def __init__(self, _: Path | None) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError(f"{error}; log='wandb' needs: pip install 'prunus[wandb]'") from None
        self.wandb: Any = wandb
        self.run: Any = None
        self.own = False

    def __call__(self, event: Event) -> None:
        values = {f"prunus/{key}": value for key, value in _numbers(event).items()}
        if not values:
            return
        if self.run is None:  # not before the first event: attaching may fail
            self.own = self.wandb.run is None
            self.run = self.wandb.run or self.wandb.init(project="prunus")
            self.run.define_metric("prunus/*", step_metric="prunus/step")
        # the loop may log steps of its own, so ours is a value beside them
        self.run.log({**values, "prunus/step": event["step"]})

    def close(self) -> None:
        if self.own:
            self.run.finish()


class _TensorBoard:
    """Logs to event files in the directory of the run, or in ``runs``."""

    def __init__(self, directory: Path | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            message = f"{error}; log='tensorboard' needs: pip install 'prunus[tensorboard]'"
            raise ImportError(message) from None
        self.directory = directory or Path("runs")
        self.make: Any = SummaryWriter  # torch leaves it untyped
        self.writer: Any = None

    def __call__(self, event: Event) -> None:
        if self.writer is None:
            # hides what an interrupted or former run in this directory said of later steps
            self.writer = self.make(str(self.directory), purge_step=event["step"])
        for key, value in _numbers(event).items():
            self.writer.add_scalar(f"prunus/{key}", value, event["step"])
        self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


LOGGERS: dict[str, Callable[[Path | None], Sink]] = {"wandb": _Wandb, "tensorboard": _TensorBoard}


class Recorder:
    """Takes events; only the first of several ranks writes or logs.

    After `close` events are still recorded and a function still receives them, but Weights & Biases
    and TensorBoard do not.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None = None,
        log: str | Sink | None = None,
    ) -> None:
        self.events: list[Event] = []
        self.directory = Path(directory) if directory is not None else None
        self._sink = self._find_sink(log) if is_main() else None
        self._sink_failed = False
        self._current = False
        """whether the file holds all of `events` but what is yet to be appended"""

    def _find_sink(self, log: str | Sink | None) -> Sink | None:
        if log is None or callable(log):
            return log
        if log not in LOGGERS:
            raise ValueError(f"log={log!r} is not known{did_you_mean(log, LOGGERS)}, or a function")
        return LOGGERS[log](self.directory)

    def __call__(self, event: Event) -> None:
        event = {**event, "time": time.time()}
        self.events.append(event)
        if self.directory is not None and is_main():
            self._write(event, self.directory)
        if self._sink is not None:
            self._pass_on(event, self._sink)

    def _pass_on(self, event: Event, sink: Sink) -> None:
        try:
            sink(event)
        except Exception as error:
            # a night of training is worth more than a line in a log
            if not self._sink_failed:
                kind, what = type(error).__name__, event["event"]
                log.warning("log= raised at the event %r: %s: %s; training goes on, and later "
                            "errors of log= are not told", what, kind, error)  # fmt: skip
            self._sink_failed = True

    def _write(self, event: Event, directory: Path) -> None:
        if self._current:
            with (directory / FILE).open("a", encoding="utf-8") as file:
                file.write(to_line(event) + "\n")
        else:
            self.save(directory)
            self._current = True

    def rewind(self, step: int) -> None:
        """Forget what came after `step`: training goes on from there.

        A new process that has recorded nothing begins with what the file of the former one says.
        """
        if not self.events and self.directory is not None and (self.directory / FILE).is_file():
            self.events = read_records(self.directory)
        # training is not over yet, and one that begins anew says so again
        stale = {"end"} if step else {"end", "start"}
        self.events = [e for e in self.events if e["step"] <= step and e["event"] not in stale]
        self._current = False

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write all events to ``directory/records.jsonl``."""
        if is_main():
            with atomic_write(Path(directory) / FILE) as draft:
                lines = (to_line(event) + "\n" for event in self.events)
                draft.write_text("".join(lines), encoding="utf-8")

    def close(self) -> None:
        """End the loggers that were asked for by name."""
        if isinstance(self._sink, _Wandb | _TensorBoard):
            self._sink.close()
            self._sink = None
