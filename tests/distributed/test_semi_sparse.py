"""2:4 training under DDP is that of one process; FSDP2 is refused."""

import pytest
import torch

from tests.distributed.semi_sparse_workers import sharded, train


@pytest.mark.parametrize("by_recipe", [True, False])
def test_two_ranks_train_as_one_process_does(ranks, by_recipe):
    alone = train(by_recipe)
    for answer in ranks(train, by_recipe):
        assert answer["sparse"] == alone["sparse"]
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(answer["weights"][name], weight)
    assert alone["sparse"] == ([False, True, True, True, True, False] if by_recipe else [True] * 6)


def test_layers_that_fsdp_shards_are_refused(ranks):
    for said in ranks(sharded):
        assert "0 (FSDPLinear)" in said
        assert "use DDP, or leave it out" in said
