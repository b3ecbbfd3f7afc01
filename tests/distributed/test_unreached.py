"""What one rank's data does not reach may be what the other's does: all ranks decide alike."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import prunus

from tests.distributed.workers import fully_shard

METHODS = {
    "wanda": (prunus.Wanda(), {}),
    "owl": (prunus.Wanda(), {"allocator": "owl"}),
    "sparsegpt": (prunus.SparseGPT(), {}),
    "block by block": (prunus.SparseGPT(), {"sequential": "blocks"}),
    "obs": (prunus.OBS(block_size=8, num_grads=8, damp=1e-4), {}),
    "fastcap": (prunus.FastCAP(block_size=8, num_grads=8), {}),
}


class Expert(nn.Module):
    """The sign of the first feature sends a token to one layer or the other."""

    def __init__(self):
        super().__init__()
        self.plus, self.minus, self.never = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        y, up = torch.zeros_like(x), x[:, 0] > 0
        y[up], y[~up] = self.plus(x[up]), self.minus(x[~up])
        return torch.cat([x[:, :1], y[:, 1:]], 1)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Expert(), Expert()]), nn.Linear(8, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def pruned(rank, method, unreached):
    """(weights, what was unreached) on this rank; None for one process with the data of both."""
    pruner, options = METHODS[method]
    torch.manual_seed(0)
    model = Model().double()
    batches = []
    for i in range(8):
        x = torch.randn(4, 8, dtype=torch.float64)
        x[:, 0] = x[:, 0].abs() * (1 if i % 2 else -1)  # each rank has tokens of one sign alone
        batches.append((x, torch.randn(4, 2, dtype=torch.float64)))
    data = prunus.Calibration(batches[rank::2] if rank is not None else batches, mse)
    ranked = model if rank is None else DistributedDataParallel(model)
    what = {"sparsity": 0.5, "layers": "blocks.*", "calibration": data, **options}
    try:
        result = prunus.prune(ranked, pruner, unreached=unreached, **what)
    except ValueError as error:
        return str(error)
    return {name: t.detach() for name, t in model.state_dict().items()}, result.unreached


def mse(output, y):
    return nn.functional.mse_loss(output, y)


def _on_rank(method, unreached):
    return pruned(torch.distributed.get_rank(), method, unreached)


def _sharded(method):
    """Which layers were without data, and the zeros of all, over the ranks' parts."""
    pruner, options = METHODS[method]
    torch.manual_seed(0)
    model = Model().double()
    for module in (*model.blocks, model):
        fully_shard(module)
    x = torch.randn(4, 8, dtype=torch.float64)
    x[:, 0] = x[:, 0].abs() * (1 if torch.distributed.get_rank() else -1)
    data = prunus.Calibration([(x, torch.randn(4, 2, dtype=torch.float64))], mse)
    what = {"sparsity": 0.5, "layers": "blocks.*", "calibration": data, **options}
    result = prunus.prune(model, pruner, unreached="magnitude", **what)
    return result.unreached, {row.name: row.zeros for row in result.rows}


@pytest.mark.parametrize("method", METHODS)
def test_ranks_agree_on_what_nobodys_data_reached(ranks, method):
    weights, unreached = pruned(None, method, "dense")
    assert unreached == {"blocks.0.never": "dense", "blocks.1.never": "dense"}
    for other, same in ranks(_on_rank, method, "dense"):
        assert same == unreached
        for name, weight in weights.items():
            torch.testing.assert_close(other[name], weight, rtol=1e-8, atol=1e-8)
    for error in ranks(_on_rank, method, "error"):
        assert "blocks.0.never" in error
        assert "plus" not in error


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "obs"])
def test_so_they_do_where_weights_are_sharded(ranks, method):
    (unreached, zeros), other = ranks(_sharded, method)
    assert (unreached, zeros) == other
    assert unreached == {"blocks.0.never": "magnitude", "blocks.1.never": "magnitude"}
    assert sum(zeros.values()) == 6 * 32
    assert zeros["blocks.0.never"] == 32
