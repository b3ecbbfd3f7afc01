"""Trials in processes of their own: one that crashes or hangs takes no other with it."""

from __future__ import annotations

import logging
import multiprocessing
import time
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

Rows = list[dict[str, Any]]
SPAWN = multiprocessing.get_context("spawn")


def _serve(pipe: Connection) -> None:
    """Try the architectures whose names come in, until None does."""
    from research.zoo.all import ARCHITECTURES
    from research.zoo.trial import trial

    torch.set_num_threads(1)
    logging.getLogger("prunus").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    while (name := pipe.recv()) is not None:
        try:
            pipe.send(list(trial(name, ARCHITECTURES[name])))
        except Exception as error:
            pipe.send([_fault(name, f"{type(error).__name__}: {error}")])


def _fault(name: str, message: str) -> dict[str, Any]:
    return {"name": name, "method": "build", "fault": message}


class Worker:
    """A process that is started when it is needed."""

    process: Any = None

    def start(self, name: str) -> Connection:
        if self.process is None:
            self.pipe, other = SPAWN.Pipe()
            self.process = SPAWN.Process(target=_serve, args=(other,), daemon=True)
            self.process.start()
            other.close()
        self.name = name
        self.pipe.send(name)
        return self.pipe

    def rows(self) -> Rows:
        """What it has found, or how it died."""
        try:
            found: Rows = self.pipe.recv()
        except EOFError:
            self.process.join()
            found = [_fault(self.name, f"the process ended with {self.process.exitcode}")]
            self.process = None
        return found

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
        self.process = None


def results(names: Sequence[str], jobs: int, limit: float) -> Iterator[Rows]:
    """The rows of each architecture as they come; a fault for what takes more than ``limit`` s."""
    todo, idle = list(names)[::-1], [Worker() for _ in range(jobs)]
    busy: dict[Connection, tuple[Worker, float]] = {}
    try:
        while todo or busy:
            while todo and idle:
                worker = idle.pop()
                busy[worker.start(todo.pop())] = worker, time.monotonic() + limit
            for pipe in wait(list(busy), 1.0):
                worker, _ = busy.pop(pipe)
                idle.append(worker)
                yield worker.rows()
            for pipe, (worker, end) in list(busy.items()):
                if time.monotonic() > end:
                    del busy[pipe]
                    worker.stop()
                    idle.append(worker)
                    yield [_fault(worker.name, f"not done after {limit:g} s")]
    finally:
        for worker in [*idle, *(worker for worker, _ in busy.values())]:
            worker.stop()
