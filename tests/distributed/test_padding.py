"""Padding on two ranks, of which one may have none: the same answers as in one process."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import prunus

from tests.distributed.workers import fully_shard, whole_state, world
from tests.helpers.towers import LENGTH, mask


class CrossBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.cross, self.up = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden_states, context):
        return hidden_states + torch.tanh(self.up(hidden_states)) + self.cross(context).mean()


class Model(nn.Module):
    """An encoder's list of blocks with a mask, and a decoder's with as many tokens and none."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(8, 8)
        self.encoder = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        self.decoder = nn.ModuleList(CrossBlock() for _ in range(2))

    def forward(self, inputs_embeds, decoder_inputs_embeds, attention_mask=None, twice=False):
        x, context = decoder_inputs_embeds, self.stem(inputs_embeds)
        for _ in range(1 + twice):
            for block in self.encoder:
                context = block(context)
        for block in self.decoder:
            x = block(x, context=context)
        return x


def _batches(padded_on, twice_on=()):
    """For each of two ranks two batches, padded for some."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for i in range(4):
        x, y = torch.randn(2, 2, LENGTH, 8, generator=generator, dtype=torch.float64)
        batches.append({"inputs_embeds": x, "decoder_inputs_embeds": y})
        if i % 2 in padded_on:
            batches[-1]["attention_mask"] = mask((LENGTH - 1, LENGTH - 2 - i // 2))
        if i % 2 in twice_on:
            batches[-1]["twice"] = True
    return batches


def _pruned(how, padded_on, sequential, twice_on=()):
    model, (rank, world_size) = Model().double(), world()
    if how == "ddp":
        model = DistributedDataParallel(model)
    elif how == "fsdp":
        for module in (*model.encoder, *model.decoder, model):
            fully_shard(module)
    data = prunus.Calibration(_batches(padded_on, twice_on)[rank::world_size])
    result = prunus.prune(
        model, "sparsegpt", sparsity=0.5, layers="*", calibration=data, sequential=sequential
    )
    return whole_state(model), result.outside_blocks


@pytest.mark.parametrize("padded_on", [(0, 1), (0,), (1,)], ids=["both", "first", "second"])
@pytest.mark.parametrize("how", ["ddp", "fsdp", "blocks"])
def test_padding_is_left_out_on_each_rank(ranks, how, padded_on):
    how, sequential = ("ddp", True) if how == "blocks" else (how, False)
    one, outside = _pruned("one", padded_on, sequential)
    for state, names in ranks(_pruned, how, padded_on, sequential):
        assert names == outside == (["stem"] if sequential else [])
        for name, t in state.items():
            torch.testing.assert_close(t, one[name], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("twice_on", [0, 1])
def test_a_list_that_one_rank_cannot_walk_is_pruned_last_on_all(ranks, twice_on):
    one, outside = _pruned("one", (), True, (twice_on,))
    assert outside == ["stem", "encoder.0.0", "encoder.1.0"]
    for state, names in ranks(_pruned, "ddp", (), True, (twice_on,)):
        assert names == outside
        for name, t in state.items():
            torch.testing.assert_close(t, one[name], rtol=1e-8, atol=1e-8)
