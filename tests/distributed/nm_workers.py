"""What the ranks are asked to do in N:M training, beside `distributed_workers.train`."""

from typing import Any

import torch
from torch import nn

import prunus

from tests.distributed.workers import batches, net, outcome, whole_state, wrapped


def evaluations(how: str, recipe: str, steps: int = 6) -> dict[str, Any]:
    """Outputs of the first global batch in evaluation mode after each step, and in training."""
    model = wrapped(net(), how)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-1, momentum=0.9)
    session = prunus.attach(model, optimizer, recipe)
    everyone = batches(steps)
    seen = []
    for x, y in everyone:
        for training in (False, True):
            model.train(training)
            with torch.no_grad():
                seen.append(model(torch.ones_like(x)).clone())
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    session.close()
    return {"outputs": seen, "weight": whole_state(model)["odd.weight"]}


def refusal(recipe: str) -> str:
    """What attaching to a sharded model says."""
    model = wrapped(net(), "fsdp")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-1)
    return outcome(lambda: prunus.attach(model, optimizer, recipe))


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(24, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.qkv(x).tanh())


def train_third(how: str, recipe: str) -> dict[str, torch.Tensor]:
    """A third of a fused weight in training, everything whole in the answer."""
    torch.manual_seed(3)
    model = wrapped(Fused().double(), how)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with prunus.attach(model, optimizer, recipe):
        for x, y in batches(8):
            nn.functional.mse_loss(model(x.mean((2, 3)).repeat(1, 2)), y[:, :2]).backward()
            optimizer.step()
            optimizer.zero_grad()
    inner = model.module if hasattr(model, "module") else model
    return {name: t.detach().clone() for name, t in inner.state_dict().items()}


def refused_third(recipe: str) -> str:
    from tests.distributed.workers import fully_shard

    model = Fused().double()
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-1)
    return outcome(lambda: prunus.attach(model, optimizer, recipe))
