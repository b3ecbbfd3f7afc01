"""Processes that stay alive over the tests of a file, and what they are asked to do."""

import io
import multiprocessing
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import prunus
from prunus.distributed import gather

PATIENCE = 60  # seconds until a rank that does not answer counts as hanging


def _serve(rank: int, world_size: int, store: Path, pipe: Any) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(store), world_size), rank=rank, world_size=world_size
    )
    while (task := pipe.recv()) is not None:
        function, args = task
        try:
            answer: Any = function(*args)
        except Exception:
            answer = AssertionError(traceback.format_exc())
        buffer = io.BytesIO()
        torch.save(answer, buffer)
        pipe.send_bytes(buffer.getvalue())
    dist.destroy_process_group()


class Ranks:
    """Calls a function on every rank and returns the answers; begun anew after a failure."""

    def __init__(self, directory: Path, world_size: int = 2) -> None:
        self.directory, self.world_size = directory, world_size
        self.processes: list[Any] = []
        self.pipes: list[Any] = []
        self.begun = 0

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        store = self.directory / f"store{self.begun}"
        self.begun += 1
        for rank in range(self.world_size):
            pipe, theirs = spawn.Pipe()
            args = (rank, self.world_size, store, theirs)
            process = spawn.Process(target=_serve, args=args, daemon=True)
            process.start()
            self.processes.append(process)
            self.pipes.append(pipe)

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((function, args))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(PATIENCE):
                answers.append(AssertionError(f"rank {rank} hangs"))
            else:
                answers.append(torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False))
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
                pipe.send(None)
            process.join()
            pipe.close()
        self.processes, self.pipes = [], []


class Net(nn.Module):
    """Seven rows do not divide by two ranks, and one row leaves a rank with nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)
        self.wide = nn.Linear(8, 24)
        self.odd = nn.Linear(24, 7)
        self.single = nn.Linear(24, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.wide(torch.tanh(self.conv(x)).mean((2, 3))).tanh()
        return torch.cat([self.odd(x), self.single(x)], 1)


def world() -> tuple[int, int]:
    """Rank and number of ranks; of the one process that sees all the data, (0, 1)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def net() -> Net:
    torch.manual_seed(1)
    return Net().double()


def wrapped(model: Net, how: str) -> nn.Module:
    """``odd`` and ``single`` are the root's own, which FSDP2 leaves gathered after a forward."""
    if how == "ddp":
        return DistributedDataParallel(model)
    if how in ("fsdp", "hsdp"):
        names = ("replicas", "shards")
        mesh = dist.init_device_mesh("cpu", (1, 2), mesh_dim_names=names) if how == "hsdp" else None
        for module in (model.conv, model.wide, model):
            fully_shard(module, mesh=mesh)
    return model


def batches(number: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's half of each of the global batches."""
    rank, world_size = world()
    generator = torch.Generator().manual_seed(2)
    xs = torch.randn(number, 8, 4, 5, 5, generator=generator, dtype=torch.float64)
    ys = torch.randn(number, 8, 8, generator=generator, dtype=torch.float64)
    return list(zip(xs[:, rank::world_size], ys[:, rank::world_size], strict=True))


def whole(t: torch.Tensor) -> torch.Tensor:
    full = t.full_tensor() if hasattr(t, "full_tensor") else t
    return full.detach().clone()


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    state = model.module.state_dict() if hasattr(model, "module") else model.state_dict()
    return {name: whole(t) for name, t in state.items()}


def whole_masks(model: nn.Module, masks: Any) -> dict[str, torch.Tensor]:
    inner = model.module if hasattr(model, "module") else model
    state = inner.state_dict()
    return {name: gather(mask, state[name]) for name, mask in masks.items()}


OPTIMIZERS = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-1, momentum=0.9),
}
FULL = StateDictOptions(full_state_dict=True)
STEPS = 8


def train(
    how: str,
    recipe: str,
    optimizer_name: str = "adam",
    begin_with: Any = None,
    stop_at: int = STEPS,
    output_dir: Path | None = None,
) -> dict[str, Any]:
    """Train from the beginning or from a saved state; everything whole in the answer."""
    model = wrapped(net(), how)
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    where = None if output_dir is None else output_dir / f"rank{world()[0]}"
    session = prunus.attach(model, optimizer, recipe, output_dir=where)
    if begin_with is not None:
        model_state, optimizer_state, session_state = begin_with
        set_state_dict(
            model,
            optimizer,
            model_state_dict=model_state,
            optim_state_dict=optimizer_state,
            options=FULL,
        )
        session.load_state_dict(session_state)
    for x, y in batches(STEPS)[session.step : stop_at]:
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    saved = None
    if stop_at < STEPS:
        saved = (*get_state_dict(model, optimizer, options=FULL), session.state_dict())
    session.close(finish=stop_at == STEPS)
    return {
        "weights": whole_state(model),
        "masks": whole_masks(model, session.masks),
        "saved": saved,
        "events": session.recorder.events,
    }


def one_shot(how: str, ties: bool, arguments: dict[str, Any]) -> dict[str, Any]:
    """`prunus.prune` with magnitudes; with ``ties``, of weights that are all 1 or 2."""
    model = net()
    if ties:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randint(1, 3, parameter.shape))
    model = wrapped(model, how)
    result = prunus.prune(model, "magnitude", **arguments)
    return {
        "weights": whole_state(model),
        "masks": whole_masks(model, result.masks),
        "rows": result.rows,
        "sparsity": result.sparsity,
    }


def outcome(function: Callable[[], Any]) -> str:
    """The error that a call ends in."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
