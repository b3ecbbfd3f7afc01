"""Models that write to tensors after hooks have seen them: what was seen is what was there."""

import copy

import pytest
import torch
from torch import nn

import prunus
from prunus.channels.depth import block_influence
from prunus.core.snapshots import Snapshots

from tests.helpers.training import same


def test_a_snapshot_is_of_now_and_one_for_each_tensor():
    keep, x, y = Snapshots(), torch.zeros(3), torch.ones(3)
    first = keep({"x": x, "both": (x, [y]), "text": "as it is"})
    assert first["x"] is first["both"][0]
    x.add_(1)
    second = keep(x)
    assert torch.equal(first["x"], torch.zeros(3))
    assert torch.equal(second, torch.ones(3))
    assert keep(y) is first["both"][1][0]
    with torch.inference_mode():
        z = torch.zeros(3)
        before = keep(z)
        z.add_(1)
        assert not torch.equal(before, keep(z))


class Block(nn.Module):
    """Writes to its input, before it computes and after."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Linear(8, 8, dtype=torch.float64) for _ in range(2))

    def forward(self, x, scale):
        h = self.b(self.a(x.relu_()))
        return x.add_(h * scale)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = (nn.Linear(8, 8, dtype=torch.float64) for _ in range(2))
        self.blocks = nn.ModuleList([Block() for _ in range(3)])

    def forward(self, x):
        x, scale = self.stem(x), torch.full((8,), 0.5, dtype=torch.float64)
        for block in self.blocks:
            x = block(x, scale)
        scale.zero_()  # which the blocks were given
        return self.head(x.tanh_())


@pytest.mark.parametrize("pruner", [prunus.SparseGPT(), prunus.Wanda(refit=True)])
def test_block_by_block_is_one_block_at_a_time_on_the_whole_model(pruner):
    data = prunus.Calibration([torch.randn(16, 8, dtype=torch.float64) for _ in range(2)])
    model = Model()
    whole = copy.deepcopy(model)
    prunus.prune(model, pruner, sparsity=0.5, sequential=True, layers="blocks.*", calibration=data)
    for i in range(3):
        prunus.prune(whole, pruner, sparsity=0.5, layers=f"blocks.{i}.*", calibration=data)
    assert same(model, whole)


def test_blocks_that_write_to_what_later_ones_are_given_are_refused():
    class Halves(Block):
        def forward(self, x, scale):
            out = super().forward(x, scale)
            scale.mul_(0.5)
            return out

    model = Model()
    model.blocks = nn.ModuleList([Halves() for _ in range(3)])
    before = {name: t.clone() for name, t in model.state_dict().items()}
    data = prunus.Calibration([torch.randn(4, 8, dtype=torch.float64)])
    what = {"sparsity": 0.5, "layers": "blocks.*", "calibration": data}
    with pytest.raises(ValueError, match="block 0 writes to a tensor that later blocks are given"):
        prunus.prune(model, "wanda", sequential=True, **what)
    assert same(before, model.state_dict())
    assert prunus.prune(model, "wanda", **what).sparsity == 0.5


class Dense(nn.Module):
    """As DenseNet: layers get the list of all that came before, and activate it in place."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Bottleneck(8 + 8 * i) for i in range(3)])
        self.head = nn.Linear(32, 2)

    def forward(self, x):
        features = [x]
        for layer in self.layers:
            features.append(layer(features))
        return self.head(torch.cat(features, 1).relu_())


class Bottleneck(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.linear1 = nn.BatchNorm1d(width), nn.Linear(width, 16, bias=False)
        self.norm2, self.linear2 = nn.BatchNorm1d(16), nn.Linear(16, 8, bias=False)

    def forward(self, features):
        x = self.linear1(self.norm1(torch.cat(features, 1)).relu_())
        out = self.linear2(self.norm2(x).relu_())
        features[0].mul_(0.5)
        return out


def test_permutations_are_verified_on_what_modules_were_given():
    model = Dense().eval()
    data = prunus.Calibration([torch.randn(4, 8)])
    result = prunus.prune(
        model, "magnitude", pattern="2:4", permute="lsa", layers="*linear2", calibration=data
    )
    assert all("undone" not in reason for reason in result.not_permuted.values())
    assert result.sparsity == 0.5


def test_the_influence_of_a_block_is_told_from_the_input_it_was_given():
    class Plain(Block):
        def forward(self, x):
            return x.relu() + self.b(self.a(x.relu()))

    class InPlace(Block):
        def forward(self, x):
            x.relu_()
            return x.add_(self.b(self.a(x)))

    blocks = {kind: nn.Sequential(*(kind() for _ in range(2))) for kind in (Plain, InPlace)}
    blocks[InPlace].load_state_dict(blocks[Plain].state_dict())
    batches = [torch.randn(size, 8, dtype=torch.float64) for size in (6, 1)]
    found = {kind: block_influence(m, prunus.Calibration(batches)) for kind, m in blocks.items()}
    assert found[Plain] == pytest.approx(found[InPlace])
    x = torch.cat(batches)
    with torch.no_grad():
        expected = 1 - torch.cosine_similarity(x, blocks[Plain][0](x)).mean()
    # batches of six and of one: seven examples, not two batches
    assert next(iter(found[Plain].values())) == pytest.approx(float(expected), rel=1e-6)
