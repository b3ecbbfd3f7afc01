"""What blocks are given: models whose blocks cannot run one by one are refused, others are right."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import prunus


class Chain(nn.Module):
    def __init__(self, count=3):
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)) for _ in range(count)
        )
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Twice(Chain):
    def forward(self, x):
        x = self.stem(x)
        for _ in range(2):
            for block in self.blocks:
                x = block(x)
        return self.head(x)


class Skip(nn.Module):
    """A U: the last block is given what the first one puts out."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x, skip=None):
            return self.fc(x if skip is None else x + skip)

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))

    def forward(self, x):
        first = self.blocks[0](x)
        return self.blocks[2](self.blocks[1](first), skip=first)


def pruned(model, sequential=True, **arguments):
    data = prunus.Calibration([torch.randn(4, 8) for _ in range(3)])
    arguments = {"pattern": "2:4", "layers": ["blocks.*"], "calibration": data, **arguments}
    return prunus.prune(model, "sparsegpt", sequential=sequential, **arguments)


def test_blocks_that_cannot_run_one_by_one_are_refused():
    model = Skip()
    before = copy.deepcopy(model.state_dict())
    message = r"blocks\.2 is given what an earlier block puts out, too; prune all at once"
    with pytest.raises(ValueError, match=message):
        pruned(model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_blocks_that_are_called_twice_are_pruned_together_on_both_inputs(caplog):
    torch.manual_seed(0)
    model = Twice()
    at_once = copy.deepcopy(model)
    data = prunus.Calibration([torch.randn(4, 8) for _ in range(3)])
    result, expected = (
        pruned(m, sequential=how, calibration=data) for m, how in ((model, True), (at_once, False))
    )
    assert result.rows == expected.rows
    assert len(result.outside_blocks) == len(result.rows) == 6
    assert all(map(torch.equal, model.parameters(), at_once.parameters()))
    assert "blocks.0 is called more than once in a forward pass: the layers of" in caplog.text


def test_a_cache_that_the_batch_asks_for_is_not_carried_from_pass_to_pass():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    plain = LlamaForCausalLM(config).eval()
    caching, ids = copy.deepcopy(plain), [torch.randint(32, (2, 8)) for _ in range(3)]
    for model, more in ((plain, {}), (caching, {"use_cache": True})):
        data = prunus.Calibration([{"input_ids": x, **more} for x in ids])
        prunus.prune(model, "sparsegpt", pattern="2:4", calibration=data, sequential=True)
    for a, b in zip(plain.parameters(), caching.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("how", ["replaced", "in place"])
def test_compiled_blocks_are_pruned_as_plain_ones(how):
    torch.manual_seed(0)
    plain = Chain()
    compiled = copy.deepcopy(plain)
    for i, block in enumerate(compiled.blocks):
        if how == "replaced":
            compiled.blocks[i] = torch.compile(block, backend="eager")
        else:
            block.compile(backend="eager")
    data = prunus.Calibration([torch.randn(4, 8) for _ in range(3)])
    for model in (plain, compiled):
        pruned(model, calibration=data)
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        assert torch.equal(a, b)


def test_blocks_run_under_the_autocast_of_the_users_forward():
    torch.manual_seed(0)
    at_once = Chain(2)
    by_block = copy.deepcopy(at_once)
    batches = [torch.randn(4, 8) for _ in range(3)]

    def forward(model, x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    data = prunus.Calibration(batches, forward=forward)
    pruned(by_block, calibration=data)
    for number in range(2):
        pruned(at_once, sequential=False, layers=[f"blocks.{number}.*"], calibration=data)
    for a, b in zip(at_once.parameters(), by_block.parameters(), strict=True):
        assert torch.equal(a, b)


def test_two_entries_cannot_share_a_folder(tmp_path):
    recipe = """
modifiers:
  - prune: {pruner: wanda, pattern: "2:4", layers: ["blocks.*.0"]}
  - prune: {pruner: wanda, pattern: "1:4", layers: ["blocks.*.2"]}
"""
    data = prunus.Calibration([torch.randn(4, 8)])
    where = prunus.Sequential("blocks", folder=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="a folder holds the blocks of one 'prune' entry"):
        prunus.prune(Chain(), recipe, calibration=data, sequential=where)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pruner", ["sparsegpt", "wanda", "alps"])
def test_half_precision_models_are_pruned_to_the_target(dtype, pruner):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64)).to(dtype)
    data = prunus.Calibration([torch.randn(32, 64).to(dtype) for _ in range(4)])
    for seed in range(4):
        again = copy.deepcopy(model)
        torch.manual_seed(seed)
        nn.init.normal_(again[0].weight)
        result = prunus.prune(again, pruner, sparsity=0.5, layers="*", calibration=data)
        assert result.sparsity == pytest.approx(0.5, abs=1e-4)
