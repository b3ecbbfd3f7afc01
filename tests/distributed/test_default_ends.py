"""The default leaves the same layers dense on all ranks, whatever each one's data show."""

import torch
import torch.distributed as dist
from torch import nn

import prunus


class Either(nn.Module):
    """One of two heads, as the first input says."""

    def __init__(self):
        super().__init__()
        self.body, self.left, self.right = (nn.Linear(8, n) for n in (8, 8, 8))

    def forward(self, x):
        h = self.body(x)
        return self.right(self.left(h)) if x[0, 0] > 0 else self.left(self.right(h))


def _spared():
    torch.manual_seed(0)
    sign = 1 - 2 * dist.get_rank()
    data = prunus.Calibration([sign * torch.ones(4, 8)])
    return prunus.prune(Either(), "magnitude", sparsity=0.5, calibration=data).left_dense


def _data_on_one_rank():
    data = prunus.Calibration([torch.ones(4, 8)] if dist.get_rank() == 0 else [])
    return prunus.prune(Either(), "magnitude", sparsity=0.5, calibration=data).left_dense


def test_the_first_ranks_batch_decides_for_all(ranks):
    assert ranks(_spared) == [["right"], ["right"]]


def test_a_rank_without_data_waits_for_no_one(ranks):
    assert ranks(_data_on_one_rank) == [["right"], ["right"]]
