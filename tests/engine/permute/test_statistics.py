"""Statistics follow the columns they were measured of."""

import torch

from prunus.engine.permute.statistics import follow
from prunus.stats import InputNorm


def measured():
    stat = InputNorm(4)
    stat.update(torch.randn(8, 4))
    return stat


def test_a_statistic_that_others_share_stays_as_it_is_for_them():
    shared, other = measured(), measured()
    norms, order = shared.norm.clone(), torch.tensor([2, 0, 3, 1])
    stats = {"moved": shared, "stays": shared, "other": other}
    assert follow(stats, {"moved": order})
    assert torch.equal(stats["moved"].norm, norms[order])
    assert stats["stays"] is shared
    assert stats["other"] is other
    assert torch.equal(shared.norm, norms)
