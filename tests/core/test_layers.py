import copy
import logging

import pytest
import torch
from torch import nn

import prunus
from prunus.core.default_dense_layers import ends
from prunus.core.fused_qkv import qkv_parts
from prunus.core.layers import all_layers
from prunus.core.selection import select
from prunus.core.wrappers import clean_name

from tests.oracles.pruning import small_cnn, small_mlp

SHAPES = {
    "linear": (nn.Linear(6, 4), torch.randn(5, 6)),
    "conv1d": (nn.Conv1d(6, 4, 3, padding=1, stride=2), torch.randn(2, 6, 9)),
    "conv2d": (nn.Conv2d(6, 4, (3, 2), padding=(1, 0)), torch.randn(2, 6, 5, 5)),
    "conv2d-grouped": (nn.Conv2d(6, 4, 3, groups=2), torch.randn(2, 6, 5, 5)),
    "conv3d": (nn.Conv3d(6, 4, 2), torch.randn(2, 6, 3, 3, 3)),
    "transposed": (nn.ConvTranspose2d(6, 4, 3), torch.randn(2, 6, 3, 3)),
    "transposed-grouped": (nn.ConvTranspose2d(6, 4, 3, groups=2), torch.randn(2, 6, 3, 3)),
    "transposed1d": (nn.ConvTranspose1d(6, 4, 3), torch.randn(2, 6, 3)),
}


def only(module):
    return next(all_layers(nn.Sequential(module)))


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize(("module", "x"), SHAPES.values(), ids=SHAPES)
def test_the_matrix_view_comes_back_and_has_one_row_for_each_output(module, x, inner):
    layer = only(module).with_channels_inner() if inner else only(module)
    w = layer.local
    m = layer.matrix(w)
    assert tuple(m.shape) == layer.matrix_shape()
    assert m.shape[0] == 4
    assert torch.equal(layer.unmatrix(m, tuple(w.shape)), w)


@pytest.mark.parametrize(("module", "x"), SHAPES.values(), ids=SHAPES)
def test_a_zero_row_silences_its_output(module, x):
    module = copy.deepcopy(module)
    layer = only(module)
    m = layer.matrix(layer.local).clone()
    m[1] = 0
    with torch.no_grad():
        layer.local.copy_(layer.unmatrix(m, layer.shape))
        module.bias.zero_()
        y = module(x)
    y = y.movedim(-1, 1) if isinstance(module, nn.Linear) else y
    assert (y[:, 1] == 0).all()
    assert (y[:, [0, 2, 3]] != 0).any()


@pytest.mark.parametrize("name", ["conv2d", "conv1d", "linear", "conv3d", "transposed"])
def test_columns_are_groups_of_input_channels_when_channels_are_inner(name):
    module, _ = SHAPES[name]
    layer = only(module).with_channels_inner()
    m = layer.matrix(layer.local).clone()
    channels = layer.channels()
    assert channels == 6
    m[:, 2::channels] = 0
    w = layer.unmatrix(m, layer.shape)
    lost = w[2] if isinstance(module, nn.ConvTranspose2d) else w[:, 2]
    assert (lost == 0).all()
    assert int((w == 0).sum()) == lost.numel()


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d"])
def test_the_input_matrix_times_the_weight_matrix_is_the_layer(name, inner):
    module, x = SHAPES[name]
    layer = only(module).with_channels_inner() if inner else only(module)
    flat = layer.input_matrix(x) @ layer.matrix(layer.local).T + module.bias
    y = module(x)
    expected = y if name == "linear" else y.flatten(2).transpose(1, 2).flatten(0, 1)
    assert torch.allclose(flat, expected, atol=1e-6)


class Conv1D(nn.Module):
    """As transformers has it: the weight is (inputs, outputs)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


def test_transformers_conv1d_is_known_by_its_shape():
    module = Conv1D(4, 8)
    layer = only(module)
    assert layer.matrix_shape() == (4, 8)
    model = nn.Sequential(module, nn.Linear(4, 2))
    prunus.prune(model, "magnitude", pattern="2:4", layers=["Conv1D"])
    zeros = module.weight == 0
    assert (zeros.T.reshape(-1, 4).sum(1) == 2).all()


@pytest.mark.parametrize("third", [0, 1, 2])
def test_a_third_is_a_layer_of_its_own_in_shape_matrix_and_memory(third):
    for module, stacked in ((nn.Linear(8, 24), False), (Conv1D(24, 8), True)):
        whole = only(module)
        layer = qkv_parts(whole)[third]
        rows = slice(8 * third, 8 * third + 8)
        part = module.weight[:, rows].T if stacked else module.weight[rows]
        assert layer.shape == (8, 8)
        assert layer.matrix_shape() == (8, 8)
        assert torch.equal(layer.matrix(layer.local), part)
        assert torch.equal(layer.unmatrix(part, layer.shape), layer.local)
        y = torch.randn(5, 3, 24)
        assert torch.equal(layer.output_matrix(y), y.reshape(15, 24)[:, rows])
        layer.local.zero_()
        assert int((module.weight == 0).sum()) == 64
        assert (part == 0).all()


def test_attention_weights_are_layers():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "out": nn.Linear(8, 2)})
    result = prunus.prune(model, "magnitude", sparsity=0.5)
    assert [row.name for row in result.rows] == ["attn.in_proj_weight", "attn.out_proj"]
    assert abs(float((model["attn"].in_proj_weight == 0).float().mean()) - 0.5) < 0.2
    split = nn.MultiheadAttention(8, 2, kdim=4, vdim=6)
    assert [layer.name for layer in all_layers(split)] == [
        "q_proj_weight",
        "k_proj_weight",
        "v_proj_weight",
        "out_proj",
    ]


def test_wrappers_leave_no_trace_in_names():
    assert clean_name("_orig_mod.blocks.0._fsdp_wrapped_module.fc.weight") == "blocks.0.fc.weight"
    compiled = torch.compile(small_mlp(), backend="eager")
    assert [layer.name for layer in all_layers(compiled)] == ["0", "2", "4"]
    assert [layer.name for layer in all_layers(nn.DataParallel(compiled))] == ["0", "2", "4"]


def test_a_module_that_is_called_module_keeps_its_name():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    layers = list(all_layers(nn.Sequential(Residual(), nn.Linear(8, 2))))
    assert [layer.parameter_name for layer in layers] == [
        "0.module.weight",
        "0.out.weight",
        "1.weight",
    ]


def test_a_parametrized_weight_is_refused_with_the_reason():
    model = small_mlp()
    from torch.nn.utils import prune as torch_prune

    torch_prune.l1_unstructured(model[2], "weight", 0.5)
    with pytest.raises(ValueError, match=r"2\.weight is computed, not stored"):
        prunus.prune(model, "magnitude", sparsity=0.5)
    prunus.prune(model, "magnitude", sparsity=0.5, exclude=["2"])
    assert (model[0].weight == 0).any()
    assert prunus.sparsity(model)["2"] == 0.5


def test_weights_that_cannot_be_pruned_are_refused_by_name():
    model = small_mlp()
    model[2].weight = nn.Parameter(torch.ones(16, 32, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"2\.weight is torch\.uint8; only floats"):
        prunus.prune(model, "magnitude", sparsity=0.5)
    with pytest.raises(ValueError, match=r"0\.weight has no shape yet; run a batch"):
        prunus.prune(nn.Sequential(nn.LazyLinear(4)), "magnitude", sparsity=0.5, layers=["0"])
    with pytest.raises(ValueError, match=r"0\.weight is on the meta device; load the weights"):
        prunus.prune(small_mlp().to("meta"), "magnitude", sparsity=0.5)
    with pytest.raises(ValueError, match="is on the meta device"):
        prunus.sweep(small_mlp().to("meta"), "magnitude", [0.5], lambda m: 0.0)


def test_the_default_spares_the_stem_and_the_head():
    assert [layer.name for layer in ends(small_cnn())] == ["0", "10"]
    assert [layer.name for layer in ends(small_mlp())] == ["4"]
    blocks = nn.ModuleDict(
        {"embed": nn.Embedding(5, 4), "layers": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])}
    )
    assert ends(blocks) == []


def test_timm_models_spare_patch_embedding_and_classifier():
    timm = pytest.importorskip("timm")
    model = timm.models.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=3
    )
    selection = select(model)
    assert selection.left_dense == ["patch_embed.proj", "head"]
    assert len(selection.layers) == 4


def test_a_backbone_has_no_head_and_a_distilled_model_has_two():
    class Timm(nn.Module):
        def __init__(self, head):
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3)
            self.blocks = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            self.heads = head

        def get_classifier(self):
            return tuple(self.heads) if isinstance(self.heads, nn.ModuleList) else self.heads

    normed = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))  # as in LeViT
    two = nn.ModuleList([nn.Linear(4, 2), normed])
    assert [layer.name for layer in ends(Timm(nn.Identity()))] == ["stem"]
    assert [layer.name for layer in ends(Timm(two))] == ["stem", "heads.0", "heads.1.1"]


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (["5"], (), ["5"]),
        (["Conv2d"], (), ["0", "2", "5"]),
        (["Linear"], ["10"], ["8"]),
        (["*.weight"], ["Conv2d"], ["8", "10"]),
        (["re:[25]"], (), ["2", "5"]),
        (["re:8|10"], (), ["8", "10"]),
        (["Module"], ["re:.*"], None),
    ],
)
def test_layers_are_chosen_by_glob_regex_and_class(include, exclude, expected):
    if expected is None:
        with pytest.raises(ValueError, match="'Module' matches nothing"):
            select(small_cnn(), include, exclude)
        return
    assert [layer.name for layer in select(small_cnn(), include, exclude).layers] == expected


def test_a_pattern_without_a_match_lists_the_nearest_names():
    model = nn.ModuleDict(
        {
            "blocks": nn.ModuleList(
                [nn.ModuleDict({"qkv": nn.Linear(4, 4), "fc1": nn.Linear(4, 4)}) for _ in range(3)]
            )
        }
    )
    with pytest.raises(
        ValueError, match=r"'blocks.\*.qvk' matches nothing; nearest: blocks.\*.qkv"
    ):
        select(model, ["blocks.*.qvk"])
    with pytest.raises(ValueError, match="exclude pattern 'fc' matches nothing"):
        select(model, None, ["fc"])
    with pytest.raises(ValueError, match="no layer is left to prune; name some"):
        select(model, ["*.fc1"], ["*.fc1"])
    with pytest.raises(ValueError, match="is not a regular expression"):
        select(model, ["re:(blocks"])
    with pytest.raises(ValueError, match="has no Linear or convolution"):
        select(nn.Sequential(nn.ReLU()))


def test_a_dead_alternative_of_a_regex_is_a_warning(caplog):
    with caplog.at_level(logging.WARNING, "prunus"):
        select(small_cnn(), [r"re:5|conv\.[ab|c](x|y)|8"])
    assert [r.args[0] for r in caplog.records] == [r"conv\.[ab|c](x|y)"]
