"""Weights that are no Linear's own are pruned as a Linear of the same weights is."""

import pytest
import torch

import prunus

from tests.helpers.cases import PRUNERS
from tests.helpers.raw_models import PAIRS


def data():
    batches = [(x, x) for x in torch.randn(3, 20, 8, dtype=torch.float64)]
    return prunus.Calibration(batches, lambda y, x: (y.sum(-1) - x.sum(-1)).square().mean())


def pruned(model, pruner, pattern):
    how = {} if ":" in pattern else {"sparsity": 0.5}
    torch.manual_seed(1)
    return prunus.prune(model, pruner, pattern=pattern, layers=["*"], calibration=data(), **how)


FEW = ("magnitude", "obs", "wanda", "sparsegpt")
CASES = [(name, pair) for name in FEW for pair in PAIRS]
CASES += [(name, "experts-transposed") for name in PRUNERS if name not in FEW]


@pytest.mark.parametrize(("name", "pair"), CASES)
def test_a_raw_weight_becomes_what_the_same_weight_of_a_linear_becomes(name, pair):
    case, pair = PRUNERS[name], PAIRS[pair]
    for pattern in ("unstructured", "2:4"):
        raw, plain = pair.made()
        pruner = case.pruner
        if hasattr(pruner, "num_grads"):
            pruner = type(pruner)(**{**vars(pruner), "num_grads": 3})
        result = pruned(raw, pruner, pattern)
        pruned(plain, pruner, pattern)
        assert result.sparsity == pytest.approx(0.5, abs=0.01)
        for a, b in zip(pair.raw_weights(raw), pair.plain_weights(plain), strict=True):
            torch.testing.assert_close(a, b.reshape(a.shape), rtol=1e-5, atol=1e-8)


def test_experts_have_names_numbers_and_rows_of_their_own():
    raw, _ = PAIRS["experts"].made()
    result = prunus.prune(raw, "magnitude", sparsity=0.5, layers=["up_proj[1]", "*down*"])
    assert [row.name for row in result.rows] == [
        "up_proj[1]",
        "down_proj[0]",
        "down_proj[1]",
        "down_proj[2]",
    ]
    assert (raw.up_proj[0] != 0).all()
    assert (raw.up_proj[2] != 0).all()
    assert int((raw.up_proj[1] == 0).sum() + (raw.down_proj == 0).sum()) == 256
    assert set(result.masks) == {"up_proj", "down_proj"}
    table = prunus.sparsity(raw)
    assert table["up_proj[1]"] == float((raw.up_proj[1] == 0).double().mean())
    assert table.total == 256 / 768
    left = prunus.prune(raw, "magnitude", sparsity=0.5, exclude=["up_proj[1]"], layers=["Experts"])
    assert "up_proj[1]" not in [row.name for row in left.rows]


def test_tables_show_a_stack_of_many_experts_as_one_row():
    class ManyExperts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up = torch.nn.Parameter(torch.randn(12, 4, 8))
            self.down = torch.nn.Parameter(torch.randn(3, 8, 4))

    model = ManyExperts()
    result = prunus.prune(model, "magnitude", sparsity=0.5, layers=["*"])
    assert len(result.rows) == 15
    for table in (result, prunus.sparsity(model)):
        first = [row[0] for row in table.cells()]
        assert first == ["up[0..11]", "down[0]", "down[1]", "down[2]", "15 layers"]
    up = next(iter(result.cells()))
    zeros = int((model.up == 0).sum())
    assert up[1:5] == ("4x8", "unstructured", f"{zeros / 384:.4f}", str(zeros))
    assert up[5] == f"≤ {max(row.score_lost for row in result.rows[:12]):.2%}"


def test_what_reads_modules_leaves_experts_alone_and_says_so():
    raw, _ = PAIRS["experts-transposed"].made()
    x = torch.randn(12, 8, dtype=torch.float64)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8).double(), raw)
    data = prunus.Calibration([x])
    result = prunus.prune(
        model, "wanda", pattern="2:4", layers=["*"], permute=True, calibration=data
    )
    assert result.not_permuted["1.up_proj[0]"] == "it is one of several matrices in a weight"
    table = prunus.estimate(model, x)
    assert [layer.macs for layer in table.layers] == [12 * 64] + 6 * [None]
    expected = model(x)
    chosen = prunus.accelerate(model, x)
    assert "Experts computes with a weight of its own" in " ".join(str(chosen).split())
    torch.testing.assert_close(model(x), expected)


def test_depthwise_convolutions_stay_dense_by_default_where_inputs_are_measured():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3),
        torch.nn.Conv2d(8, 8, 3, groups=8),
        torch.nn.Conv2d(8, 8, 1, groups=2),
        torch.nn.Conv2d(8, 8, 1),
        torch.nn.Flatten(),
        torch.nn.Linear(128, 2),
    )
    data = prunus.Calibration([torch.randn(2, 3, 8, 8)])
    result = prunus.prune(model, "wanda", sparsity=0.5, calibration=data)
    assert [row.name for row in result.rows] == ["2[0]", "2[1]", "3"]
    assert result.spared["1"] == "depthwise or transposed, so its inputs are not measured"
    assert "1 (depthwise or transposed" in " ".join(str(result).split())
    with pytest.raises(ValueError, match=r"1 \(Conv2d\): each group of its channels has inputs"):
        prunus.prune(model, "wanda", sparsity=0.6, layers=["*"], calibration=data)
    swept = prunus.sweep(model, "wanda", [0.5], lambda m: 0.0, calibration=data)
    assert list(swept.recorder.events[1]["layers"]) == ["2[0]", "2[1]", "3"]
    assert "1" in [r.name for r in prunus.prune(model, "magnitude", sparsity=0.6).rows]


def test_tables_mean_stacks_and_single_experts():
    raw, _ = PAIRS["experts"].made()
    table = {"up_proj[1]": 0.25, "up_proj": 0.5, "down_proj": 0.75}
    result = prunus.prune(raw, "magnitude", layers=["*"], allocator=table)
    assert [row.sparsity for row in result.rows] == [0.5, 0.25, 0.5, 0.75, 0.75, 0.75]


def test_along_the_inputs_is_along_the_inputs_whichever_way_experts_are_stored():
    for name in ("experts", "experts-transposed"):
        raw, _ = PAIRS[name].made()
        prunus.prune(raw, "magnitude", pattern="2:4", layers=["*"])
        for w in PAIRS[name].raw_weights(raw):
            assert ((w != 0).reshape(len(w), -1, 4).sum(-1) == 2).all()


def test_rows_with_different_inputs_are_measured_apart_or_refused():
    class Cross(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mha = torch.nn.MultiheadAttention(8, 1, bias=False)

        def forward(self, x):
            return self.mha(x[:2], x[2:], x[2:])[0]

    model, x = Cross(), torch.randn(9, 8)
    expected = model.mha.in_proj_weight.detach().chunk(3)
    norms = [part.norm(dim=0) for part in (x[:2], x[2:], x[2:])]
    how = {"pattern": "row", "layers": ["mha.in*"], "calibration": prunus.Calibration([x])}
    result = prunus.prune(model, "wanda", sparsity=0.5, **how)
    assert [row.name[-3:] for row in result.rows] == ["[q]", "[k]", "[v]"]
    for got, w, norm in zip(model.mha.in_proj_weight.chunk(3), expected, norms, strict=True):
        keep = (w.abs() * norm).argsort(1).argsort(1) >= 4
        assert torch.equal(got != 0, keep)


RECIPES = {
    "gradual": "modifiers: [prune: {sparsity: {from: 0.3, to: 0.5}, window: {to: 75%, every: 25%}, layers: ['*']}]",
    "trained": "modifiers: [nm_training: {pattern: '2:4', masking: sr_ste, layers: ['*']}]",
    "hidden": "modifiers: [nm_training: {pattern: '2:4', masking: mdgf, layers: ['*']}]",
}


@pytest.mark.parametrize("pair", ["experts-transposed", "heads", "recurrent", "bilinear"])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_training_masks_them_as_it_does_linear_layers_and_resumes(recipe, pair, tmp_path):
    pair = PAIRS[pair]
    models = pair.made()
    for model in models:
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        session = prunus.attach(model, optimizer, recipe, steps_per_epoch=4, epochs=1)
        for step in range(4):
            x = torch.randn(
                20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step)
            )
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 1:
                state = session.state_dict()
                session.load_state_dict(state)
        session.close()
    raw, plain = models
    for a, b in zip(pair.raw_weights(raw), pair.plain_weights(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
        assert float((a == 0).double().mean()) == pytest.approx(0.5, abs=0.1)
    prunus.save(raw, tmp_path / "raw.safetensors", pruning=session if model is raw else None)
    loaded = prunus.load(tmp_path / "raw.safetensors")
    for name, p in raw.named_parameters():
        assert torch.equal(loaded.state_dict[name], p)
