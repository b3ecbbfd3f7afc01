"""Training on two ranks, of which the second fails."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import prunus
from prunus.stats import BlockFisher

from tests.distributed import workers

RECIPE = """
modifiers:
  - prune:
      pruner: {name: cap, block_size: 4, num_grads: 16}
      layers: ["*"]
      sparsity: {from: 0.2, to: 0.6, curve: cubic}
      window: {from: 0step, to: 6step, every: 2step}
"""


class Fails:
    """On the second rank, at the third call."""

    def __init__(self, when: bool) -> None:
        self.calls, self.when = 0, when

    def __call__(self) -> None:
        self.calls += 1
        if self.when and self.calls == 3 and workers.world()[0] == 1:
            raise ArithmeticError("out of luck")


def failing(update: Callable[..., None], fails: Fails) -> Callable[..., None]:
    def failing_update(stat: BlockFisher, grads: torch.Tensor) -> None:
        fails()
        update(stat, grads)

    return failing_update


def train(rank: int, how: str, where: str, folder: Path) -> None:
    """``how`` is as in `workers.wrapped`; ``where`` it fails: in the ``loss`` or the ``update`` of
    a Fisher matrix in the middle of its collection, or in the loop, ``between`` two steps.

    Leaves a file in the folder if it comes to the end.
    """
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.set_num_threads(1)
    in_loss, in_loop = Fails(where == "loss"), Fails(where == "between")
    BlockFisher.update = failing(BlockFisher.update, Fails(where == "update"))  # type: ignore[method-assign]

    def loss(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        in_loss()
        return nn.functional.mse_loss(output, y)

    model = workers.wrapped(workers.net(), how)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    calibration = prunus.Calibration(workers.batches(8), loss)
    with prunus.attach(model, optimizer, RECIPE, calibration=calibration):
        for x, y in workers.batches(workers.STEPS):
            in_loop()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    (folder / f"finished{rank}").touch()
