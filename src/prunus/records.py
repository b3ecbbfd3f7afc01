"""Events of a run: kept in memory, streamed to ``records.jsonl``, passed on to loggers."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist

from prunus.names import did_you_mean

Event = dict[str, Any]
Sink = Callable[[Event], None]
FILE = "records.jsonl"


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to; it takes the place of `path` only when all went well.

    On an error (a full disk, an interrupt) the file that was there stays as it was.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    draft = Path(name)
    try:
        yield draft
        with draft.open("rb") as written:
            os.fsync(written.fileno())
        mask = os.umask(0)
        os.umask(mask)
        draft.chmod(0o666 & ~mask)
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


def read_records(directory: str | os.PathLike[str]) -> list[Event]:
    """The events of a run. Raises FileNotFoundError if the directory has none."""
    path = Path(directory) / FILE
    if not path.is_file():
        raise FileNotFoundError(f"no {FILE} in '{directory}'; is it the directory of a run?")
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def is_main() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def number(value: Any) -> float:
    """A float of what people log: a number, or a tensor of one, with or without gradient."""
    return float(value.detach() if hasattr(value, "detach") else value)


def _numbers(event: Event) -> dict[str, float]:
    """What a chart can show of an event."""
    skip = ("step", "event", "time")
    return {k: v for k, v in event.items() if k not in skip and isinstance(v, (int, float))}


def _wandb() -> Sink:
    try:
        import wandb
    except ImportError as error:
        raise ImportError(f"{error}; log='wandb' needs: pip install 'prunus[wandb]'") from None
    run = wandb.run or wandb.init(project="prunus")

    def sink(event: Event) -> None:
        values = {f"prunus/{key}": value for key, value in _numbers(event).items()}
        if values:
            # the loop may log steps of its own, so ours is a value beside them
            run.log({**values, "prunus/step": event["step"]})

    return sink


def _tensorboard(directory: Path) -> Sink:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        message = f"{error}; log='tensorboard' needs: pip install tensorboard"
        raise ImportError(message) from None
    make: Any = SummaryWriter  # torch leaves it untyped
    writer = make(str(directory))

    def sink(event: Event) -> None:
        for key, value in _numbers(event).items():
            writer.add_scalar(f"prunus/{key}", value, event["step"])
        writer.flush()

    return sink


class Recorder:
    """Takes events; only the first of several ranks writes or logs."""

    def __init__(
        self,
        directory: str | os.PathLike[str] | None = None,
        log: str | Sink | None = None,
    ) -> None:
        self.events: list[Event] = []
        self.directory = Path(directory) if directory is not None else None
        self._file: IO[str] | None = None
        self._sink = self._find_sink(log) if is_main() else None

    def _find_sink(self, log: str | Sink | None) -> Sink | None:
        if log is None or callable(log):
            return log
        if log == "wandb":
            return _wandb()
        if log == "tensorboard":
            return _tensorboard(self.directory or Path("runs"))
        options = ["wandb", "tensorboard"]
        raise ValueError(f"log={log!r} is not known{did_you_mean(log, options)}, or a function")

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if self.directory is not None and is_main():
            if self._file is None:
                self.directory.mkdir(parents=True, exist_ok=True)
                self._file = (self.directory / FILE).open("w")
                self._file.writelines(json.dumps(e) + "\n" for e in self.events[:-1])
            self._file.write(json.dumps(event) + "\n")
            self._file.flush()
        if self._sink is not None:
            self._sink(event)

    def rewind(self, step: int) -> None:
        """Forget what came after `step`: training goes on from there."""
        unread = self.directory if self._file is None and is_main() else None
        if unread is not None and (unread / FILE).is_file():
            self.events = read_records(unread) + self.events
        self.events = [event for event in self.events if event["step"] <= step]

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write all events to ``directory/records.jsonl``."""
        if is_main():
            with atomic_write(Path(directory) / FILE) as draft:
                draft.write_text("".join(json.dumps(event) + "\n" for event in self.events))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            # a later event must append to what is there, not begin anew
            self.save(self.directory or ".")
            self.directory = None
