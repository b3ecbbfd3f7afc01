"""What the ranks of the 2:4 training tests, and the one process beside them, are asked to do."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import prunus
from prunus.execution.training import SemiSparseLinear, swap_linear_with_semi_sparse_linear

from tests.distributed.workers import world

STEPS = 6
ENTRY = "gradient: sr_ste, decay: 0.1, window: {from: 1step, to: 5step}"


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)).double()


def inputs() -> list[torch.Tensor]:
    """This rank's half of each of the global batches."""
    rank, size = world()
    generator = torch.Generator().manual_seed(2)
    whole = [torch.randn(8, 8, generator=generator, dtype=torch.float64) for _ in range(STEPS)]
    return [x.chunk(size)[rank] for x in whole]


def train(by_recipe: bool) -> dict[str, object]:
    """Trains by the recipe entry, or with a layer swapped inside its wrapper."""
    inner = net()
    model = DistributedDataParallel(inner) if world()[1] > 1 else inner
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    recipe = f"modifiers: [semi_sparse: {{layers: ['0'], {ENTRY}}}]"
    session = prunus.attach(model, optimizer, recipe) if by_recipe else None
    if session is None:
        swap_linear_with_semi_sparse_linear(model, {"0": SemiSparseLinear})
    sparse = []
    for x in inputs():
        sparse.append(isinstance(inner[0], SemiSparseLinear))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    if session is not None:
        session.close()
    return {"sparse": sparse, "weights": {k: v.detach() for k, v in inner.state_dict().items()}}


def sharded() -> str:
    """What is said of a layer that FSDP2 shards."""
    from tests.distributed.workers import fully_shard

    model = net()
    fully_shard(model[0])
    fully_shard(model)
    try:
        swap_linear_with_semi_sparse_linear(model, {"0": SemiSparseLinear})
    except ValueError as error:
        return str(error)
    return ""
