"""What the ranks of the distributed tests, and the one process beside them, are asked to do."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

import prunus
from prunus.core.sharding import gather
from prunus.stats import InputNorm

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:  # where torch 2.6 may have it
    from torch.distributed._composable.fsdp import fully_shard


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
    if begin_with is not None:  # before attach, because it steps the optimizer to make its state
        set_state_dict(
            model,
            optimizer,
            model_state_dict=begin_with[0],
            optim_state_dict=begin_with[1],
            options=FULL,
        )
    session = prunus.attach(model, optimizer, recipe, output_dir=where)
    if begin_with is not None:
        session.load_state_dict(begin_with[2])
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


RECIPE = """
modifiers:
  - prune:
      pruner: magnitude
      layers: {layers}
      allocator: {allocator}
      pattern: {pattern}
      sparsity: {{from: 0.2, to: 0.6, curve: cubic}}
      window: {{from: 1step, to: 6step, every: 2step}}
"""


def recipe(allocator="global", pattern="unstructured", layers='["*"]') -> str:
    return RECIPE.format(allocator=allocator, pattern=pattern, layers=layers)


@dataclass(frozen=True)
class InputScaled:
    """Wanda's score."""

    name: ClassVar[str] = "input_scaled"
    patterns: ClassVar[tuple[str, ...]] = ("unstructured", "row", "N:M", "block")
    allocator: ClassVar[str] = "uniform"

    def statistic(self, layer):
        return InputNorm(layer.matrix_shape()[1])

    def scores(self, w, stat, pattern, ranks):
        return w.abs() * stat.norm

    def rebuild(self, w, stat, mask):
        return w
