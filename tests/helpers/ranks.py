"""Processes that stay alive over many tests, because starting one takes seconds."""

import io
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.helpers.programs import FORKS

PATIENCE = 60  # seconds until a rank that does not answer counts as hanging


def _pack(value: Any) -> bytes:
    # a pipe's own pickling would let all ranks share the memory of a tensor
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpack(packed: bytes) -> Any:
    return torch.load(io.BytesIO(packed), weights_only=False)


def _serve(rank: int, world_size: int, store: Path, pipe: Any) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(store), world_size), rank=rank, world_size=world_size
    )
    while (task := _unpack(pipe.recv_bytes())) is not None:
        function, args = task
        try:
            answer: Any = function(*args)
        except Exception:
            answer = AssertionError(traceback.format_exc())
        pipe.send_bytes(_pack(answer))
    dist.destroy_process_group()


class RankProcesses:
    """Calls a function on every rank and returns the answers; begun anew after a failure."""

    def __init__(self, directory: Path, world_size: int = 2) -> None:
        self.directory, self.world_size = directory, world_size
        self.processes: list[Any] = []
        self.pipes: list[Any] = []
        self.begun = 0

    def _start(self) -> None:
        store = self.directory / f"store{self.begun}"
        self.begun += 1
        for rank in range(self.world_size):
            pipe, theirs = FORKS.Pipe()
            args = (rank, self.world_size, store, theirs)
            process = FORKS.Process(target=_serve, args=args, daemon=True)
            process.start()
            self.processes.append(process)
            self.pipes.append(pipe)

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send_bytes(_pack((function, args)))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(PATIENCE):
                answers.append(AssertionError(f"rank {rank} hangs"))
            else:
                answers.append(_unpack(pipe.recv_bytes()))
        failures = [answer for answer in answers if isinstance(answer, AssertionError)]
        if failures:
            self.stop(kill=True)
            raise AssertionError("\n".join(map(str, failures)))
        return answers

    def stop(self, kill: bool = False) -> None:
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            if kill:
                process.kill()
            else:
                pipe.send_bytes(_pack(None))
            process.join()
            pipe.close()
        self.processes, self.pipes = [], []
