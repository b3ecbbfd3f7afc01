"""Q, K and V in one fused weight, each addressed alone."""

import copy
import itertools

import pytest
import torch
from torch import nn

import prunus
from prunus.core.fused_qkv import split_third
from prunus.core.selection import select

from tests.oracles.nm import Conv1D, Net


class Split(nn.Module):
    """`nm_oracles.Net` with three layers in place of its fused one."""

    def __init__(self, net):
        super().__init__()
        net = copy.deepcopy(net)
        self.embed, fused = net.embed, net.attn.qkv
        for name, w, b in zip("qkv", fused.weight.chunk(3), fused.bias.chunk(3), strict=True):
            part = nn.Linear(8, 8).double()
            part.weight, part.bias = (nn.Parameter(t.detach().clone()) for t in (w, b))
            setattr(self, name, part)
        self.proj, self.head = net.attn.proj, net.head

    def forward(self, x):
        x = self.embed(x)
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.head(torch.tanh(self.proj((q @ k.mT).softmax(-1) @ v)).mean(1))


def pair():
    torch.manual_seed(1)
    net = Net().double()
    return net, Split(net)


def batches(number=6):
    torch.manual_seed(2)
    return [(torch.randn(8, 4, 5).double(), torch.randint(3, (8,))) for _ in range(number)]


def calibration():
    return prunus.Calibration(batches(), nn.functional.cross_entropy)


PRUNERS = {
    "magnitude": prunus.Magnitude(),
    "wanda": prunus.Wanda(),
    "ria": prunus.RIA(),
    "sparsegpt": prunus.SparseGPT(),
    "alps": prunus.ALPS(),
    "obs": prunus.OBS(block_size=8, damp=1e-4),
    "obs by example": prunus.OBS(block_size=8, damp=1e-4, samples="example"),
    "cap": prunus.CAP(block_size=8, damp=1e-4),
    "fastcap": prunus.FastCAP(),
}


def test_the_split_model_is_the_fused_one():
    net, split = pair()
    x = batches(1)[0][0]
    torch.testing.assert_close(net(x), split(x))


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
@pytest.mark.parametrize("name", PRUNERS)
def test_pruning_a_third_equals_pruning_a_layer_of_its_own(name, pattern):
    net, split = pair()
    kept = net.attn.qkv.weight.detach().clone()
    arguments = {
        "pattern": pattern,
        "sparsity": None if pattern == "2:4" else 0.4,
        "calibration": calibration(),
    }
    fused = prunus.prune(net, PRUNERS[name], layers=["attn.qkv[q]", "attn.proj"], **arguments)
    apart = prunus.prune(split, PRUNERS[name], layers=["q", "proj"], **arguments)
    torch.testing.assert_close(net.attn.qkv.weight[:8], split.q.weight, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(net.attn.proj.weight, split.proj.weight, rtol=1e-9, atol=1e-10)
    assert torch.equal(net.attn.qkv.weight[8:], kept[8:])
    mask = fused.masks["attn.qkv.weight"]
    assert torch.equal(mask[:8], apart.masks["q.weight"])
    assert mask[8:].all()
    for mine, theirs in zip(fused.rows, apart.rows, strict=True):
        assert (mine.shape, mine.size, mine.zeros) == (theirs.shape, theirs.size, theirs.zeros)
        assert mine.score_lost == pytest.approx(theirs.score_lost)
    assert [row.name for row in fused.rows] == ["attn.qkv[q]", "attn.proj"]


@pytest.mark.parametrize("name", ["magnitude", "cap"])
def test_all_thirds_with_an_entry_each_equal_three_layers(name):
    net, split = pair()
    for letter, sparsity in zip("qkv", (0.25, 0.5, 0.75), strict=True):
        arguments = {"sparsity": sparsity, "calibration": calibration()}
        prunus.prune(net, PRUNERS[name], layers=[f"attn.qkv[{letter}]"], **arguments)
        prunus.prune(split, PRUNERS[name], layers=[letter], **arguments)
    parts = torch.cat([split.q.weight, split.k.weight, split.v.weight])
    torch.testing.assert_close(net.attn.qkv.weight, parts, rtol=1e-9, atol=1e-10)


GRADUAL = """
modifiers:
  - prune: {pruner: magnitude, layers: [%s], sparsity: {from: 0.2, to: 0.7}, window: {from: 1step, to: 7step, every: 2step}}
  - nm_training: {pattern: 1:4, layers: [%s], masking: {name: mdgf, decay: cosine}, window: {from: 2step, to: 8step}}
  - nm_training: {pattern: 2:4 along outputs, layers: [%s], masking: sr_ste, window: {to: 9step}}
"""


@pytest.mark.parametrize("named", list(itertools.permutations("qkv")))
def test_entries_of_all_kinds_share_a_fused_weight_as_they_would_three_layers(named):
    net, split = pair()
    sessions = []
    for model, names in ((net, [f'"attn.qkv[{x}]"' for x in named]), (split, named)):
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        session = prunus.attach(model, optimizer, GRADUAL % tuple(names))
        for x, y in batches(11):
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        session.close()
        sessions.append(session)
    parts = [split.get_submodule(x).weight for x in "qkv"]
    torch.testing.assert_close(net.attn.qkv.weight, torch.cat(parts), rtol=1e-9, atol=1e-10)
    fused, apart = (session.masks for session in sessions)
    assert torch.equal(fused["attn.qkv.weight"], torch.cat([apart[f"{x}.weight"] for x in "qkv"]))
    assert sessions[0].sparsity == sessions[1].sparsity


def test_two_maskings_with_patterns_of_their_own_in_one_weight():
    net, _ = pair()
    recipe = """
modifiers:
  - nm_training: {pattern: 1:4, layers: ["attn.qkv[q]"], masking: mdgf, window: {to: 5step}}
  - nm_training: {pattern: 2:4, layers: ["attn.qkv[k]"], masking: sr_ste, window: {to: 5step}}
"""
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with prunus.attach(net, optimizer, recipe):
        for x, y in batches(6):
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    q, k, v = (
        (w != 0).reshape(-1, 4).sum(1).unique().tolist() for w in net.attn.qkv.weight.chunk(3)
    )
    assert (q, k, v) == ([1], [2], [4])


@pytest.mark.parametrize(
    ("entry", "more"),
    [("prune", "sparsity: 0.5"), ("nm_training", "pattern: 2:4, window: {to: 9step}")],
)
def test_the_plan_counts_the_mask_of_the_whole_weight(entry, more):
    net = Net()
    recipe = f"modifiers: [{entry}: {{layers: ['attn.qkv[q]', 'attn.qkv[k]', attn.proj], {more}}}]"
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    with prunus.attach(net, optimizer, recipe) as session:
        planned = session.runs[0].memory()["masks"]
        optimizer.step()
        assert planned == sum(mask.nbytes for mask in session.masks.values()) == 3 * 64 + 64


# names


def names(include=None, exclude=(), model=None):
    return [layer.name for layer in select(model or Net(), include, exclude).layers]


def test_thirds_are_chosen_and_left_out_by_name_and_glob():
    assert names(["attn.qkv[v]", "*.qkv[q]"]) == ["attn.qkv[q]", "attn.qkv[v]"]
    assert names(["attn.qkv[q]", "*qkv[q]", "attn.proj"]) == ["attn.qkv[q]", "attn.proj"]
    assert names(["attn.*"], ["*.qkv[v]"]) == ["attn.qkv[q]", "attn.qkv[k]", "attn.proj"]
    assert names(["attn.*"], ["attn.qkv[q]", "attn.qkv[k]", "attn.qkv[v]"]) == ["attn.proj"]
    assert names(["attn.qkv[q]", "attn.proj"], ["attn.qkv"]) == ["attn.proj"]
    assert names(["attn.qkv[q]", "attn.qkv[k]"], ["attn.qkv[q]"]) == ["attn.qkv[k]"]
    assert names([r"re:attn\.qkv\[k\]"]) == ["attn.qkv[k]"]


def test_tables_print_the_names_of_thirds_and_whatever_looks_like_markup():
    result = prunus.prune(Net(), "magnitude", sparsity=0.5, layers=["attn.qkv[q]", "attn.qkv[k]"])
    result.spared = {"attn.qkv[v]": "why", ":smile:": "why"}
    assert "attn.qkv[q]" in str(result)
    assert "left dense: attn.qkv[v], :smile: (why)" in str(result)
    values = prunus.api.sweep_result.SweepResult({0.5: {"accuracy[top]": 1.0}})
    assert "accuracy[top]" in str(values)


def test_split_third_reads_the_end_of_a_pattern():
    assert split_third("attn.qkv[q]") == ("attn.qkv", "q")
    assert split_third("*.attn.qkv") == ("*.attn.qkv", "")
    assert split_third("layers[12]") == ("layers[12]", "")


def test_a_class_of_characters_that_matches_layers_stays_one():
    model = nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 4), "x": nn.Linear(4, 4)})
    assert names(["[qk]"], model=model) == ["q", "k"]
    assert names(["[q]"], model=model) == ["q"]


def test_other_fused_weights_have_thirds_too():
    model = nn.ModuleDict(
        {
            "c_attn": Conv1D(24, 8),
            "in_proj": nn.MultiheadAttention(8, 2),
            "Wqkv": nn.Linear(8, 24),
        }
    )
    chosen = select(model, ["c_attn[v]", "in_proj.in_proj_weight[k]", "Wqkv[q]"]).layers
    marked = []
    for layer in chosen:
        with torch.no_grad():
            layer.local.fill_(7)
        marked.append((layer.shape, layer.matrix_shape()))
    assert marked == [((8, 8), (8, 8))] * 3
    assert (model["c_attn"].weight == 7)[:, 16:].all()
    assert (model["in_proj"].in_proj_weight == 7)[8:16].all()
    assert (model["Wqkv"].weight == 7)[:8].all()
    for layer in chosen:
        assert int((layer.weight == 7).sum()) == 64


class HeadFirst(nn.Module):
    """As MaxViT: each head has its own q, k and v, one after the other."""

    head_first = True

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)


class KeyDim(nn.Module):
    """As TinyViT and LeViT, whose keys are narrower than their values."""

    key_dim = 4

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)


class Grouped(nn.Module):
    """Fewer keys and values than queries."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 16)


@pytest.mark.parametrize(
    ("model", "pattern", "message"),
    [
        (Net(), "attn.proj[q]", "attn.proj[q]: 'proj' is not known to stack q, k and v"),
        (HeadFirst(), "qkv[q]", "q, k and v lie head by head here, not in thirds"),
        (KeyDim(), "qkv[k]", "lie head by head here"),
        (Grouped(), "qkv[v]", "16 outputs of 8 inputs are no three square parts"),
        (Net(), "attn.qvk[q]", "layer pattern 'attn.qvk' matches nothing; nearest: attn.qkv"),
        (Net(), "attn.qkv[x]", "layer pattern 'attn.qkv[x]' matches nothing; nearest: attn.qkv"),
    ],
)
def test_thirds_that_cannot_be_are_refused_with_the_reason(model, pattern, message):
    with pytest.raises(ValueError) as caught:
        names([pattern], model=model)
    assert message in str(caught.value)


def test_a_weight_named_whole_and_in_part_is_refused():
    with pytest.raises(ValueError, match=r"attn.qkv is named whole and, by '\*.qkv\[q\]', in part"):
        names(["attn.*", "*.qkv[q]"])


def test_whole_layers_are_permuted_not_thirds():
    with pytest.raises(ValueError, match=r"moves whole layers, not attn.qkv\[q\]"):
        net, _ = pair()
        prunus.prune(
            net,
            "ria",
            layers=["attn.qkv[q]"],
            pattern="2:4",
            permute="lsa",
            calibration=calibration(),
        )
