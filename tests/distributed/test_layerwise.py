"""Layerwise methods on two ranks: the same masks and weights as in one process."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import prunus

from tests.distributed.workers import batches, net, whole_masks, whole_state, world, wrapped

METHODS = {
    "wanda-row": (prunus.Wanda(), {"sparsity": 0.5, "pattern": "row"}),
    "wanda-refit": (prunus.Wanda(swap=True, refit=True), {"pattern": "2:4"}),
    "wanda-owl": (prunus.Wanda(), {"sparsity": 0.6, "allocator": "owl"}),
    "ri": (prunus.RI(), {"sparsity": 0.6}),
    "ria": (prunus.RIA(), {"sparsity": 0.6}),
    "ria-2:4": (prunus.RIA(), {"pattern": "2:4"}),
    "ria-alphapruning": (prunus.RIA(), {"sparsity": 0.6, "allocator": "alphapruning"}),
    "sparsegpt": (prunus.SparseGPT(), {"sparsity": 0.6}),
    "sparsegpt-refit": (prunus.SparseGPT(refit=True), {"pattern": "2:4"}),
    "alps-2:4": (prunus.ALPS(), {"pattern": "2:4"}),
}


def inputs(how):
    """Under DDP the halves of each batch, one process takes both; under FSDP2 likewise."""
    xs = [x for x, _ in batches(4)]
    if how == "one":
        return [x[r::2] for x in xs for r in range(2)]
    return xs


def _pruned(how, pruner, arguments):
    model = wrapped(net(), how)
    data = prunus.Calibration(inputs(how))
    result = prunus.prune(model, pruner, layers="*", calibration=data, **arguments)
    return {
        "weights": whole_state(model),
        "masks": whole_masks(model, result.masks),
        "errors": [row.error for row in result.rows],
    }


def assert_same(answer, one, close=1e-8):
    """Weights that no calibration input tells apart, a refit leaves to rounding."""
    for name, mask in one["masks"].items():
        assert torch.equal(answer["masks"][name], mask), name
    for name, weight in one["weights"].items():
        torch.testing.assert_close(answer["weights"][name], weight, rtol=close, atol=close)
    for mine, theirs in zip(answer["errors"], one["errors"], strict=True):
        assert mine == theirs is None or mine == pytest.approx(theirs, rel=1e-6)


# under FSDP2 each rank's ALPS ends when the masks of its own rows stand still
@pytest.mark.parametrize(
    ("method", "how"),
    [(m, how) for m in METHODS for how in ("ddp", "fsdp") if (m, how) != ("alps-2:4", "fsdp")],
)
def test_ranks_add_up_what_they_see(ranks, method, how):
    one = _pruned("one", *METHODS[method])
    for answer in ranks(_pruned, how, *METHODS[method]):
        refitted = "refit" in method or "alps" in method
        assert_same(answer, one, 1e-4 if refitted else 1e-8)


class Blocks(nn.Module):
    """A stem, three residual blocks and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16)) for _ in range(3)
        )
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def _block_by_block(alone=False):
    torch.manual_seed(3)
    model = Blocks().double()
    generator = torch.Generator().manual_seed(4)
    data = [torch.randn(6, 8, generator=generator, dtype=torch.float64) for _ in range(4)]
    rank, world_size = world()
    if alone:
        data = [x[r::2] for x in data for r in range(2)]
    else:
        model = DistributedDataParallel(model)
        data = [x[rank::world_size] for x in data]
    result = prunus.prune(
        model,
        "sparsegpt",
        pattern="2:4",
        layers=["blocks.*"],
        calibration=prunus.Calibration(data),
        permute="lsa",
        sequential=True,
    )
    assert result.permuted
    return {
        "weights": whole_state(model),
        "masks": whole_masks(model, result.masks),
        "errors": [row.error for row in result.rows],
    }


def test_blocks_are_pruned_and_permuted_alike_on_all_ranks(ranks):
    one = _block_by_block(alone=True)
    for answer in ranks(_block_by_block):
        assert_same(answer, one)


class Picky(nn.Module):
    """Its hidden channels are alike, unless the inputs are those of the second rank."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)
        self.register_buffer("scale", torch.linspace(0.1, 2, 16))

    def forward(self, x):
        hidden = self.fc1(x).relu()
        if x.mean() > 2:
            if self.scale.sum() < 0:
                raise ArithmeticError("a rank of its own")
            hidden = hidden * self.scale
        return x + self.fc2(hidden)


def _picky(case):
    torch.manual_seed(0)
    model, (rank, _) = Picky().double(), world()
    if case == "fails":
        model.scale.neg_()
    data = [torch.randn(8, 8, dtype=torch.float64) + 5 * rank * (case != "alike")]
    data = [] if case == "empty" and rank else data
    before = whole_state(model)
    try:
        result = prunus.prune(
            model,
            "magnitude",
            pattern="2:4",
            layers=["fc2"],
            calibration=prunus.Calibration(data),
            permute="lsa",
        )
    except (ArithmeticError, RuntimeError) as error:
        return str(error), all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    return len(result.permuted), result.not_permuted, whole_state(model)


@pytest.mark.parametrize("case", ["alike", "differs", "empty"])
def test_ranks_take_a_fold_all_or_none(ranks, case):
    (count, _, one), (other, why, two) = ranks(_picky, case)
    assert count == other == (case == "alike")
    assert (case == "alike") or why
    assert all(torch.equal(t, two[name]) for name, t in one.items())


def test_a_rank_whose_verification_fails_does_not_leave_the_others_waiting(ranks):
    for said, untouched in ranks(_picky, "fails"):
        assert "a rank of its own" in said
        assert untouched


def _cap_permuted():
    torch.manual_seed(3)
    model, (rank, _) = Blocks().double(), world()
    generator = torch.Generator().manual_seed(4 + rank)
    data = [torch.randn(6, 8, generator=generator, dtype=torch.float64) for _ in range(2)]
    prunus.prune(
        model,
        prunus.CAP(block_size=8, num_grads=2),
        pattern="2:4",
        layers=["blocks.*"],
        calibration=prunus.Calibration(data, forward=lambda model, x: model(x).square().mean()),
        permute="lsa",
    )
    return whole_state(model)


def test_rows_dealt_out_among_ranks_take_one_order(ranks):
    one, two = ranks(_cap_permuted)
    assert all(torch.equal(t, two[name]) for name, t in one.items())
