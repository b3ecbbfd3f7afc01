"""Models of timm, one of each way to write a network; many more in the benchmark of the sweep."""

import copy

import pytest
import torch

from prunus.channels import channels, shrink

from tests.channels.channel_oracles import error, masked_copy, randomized

timm = pytest.importorskip("timm")

SWIN = {"depths": (2, 1), "num_heads": (2, 4), "embed_dim": 16, "img_size": 56}
MIXER = {"img_size": 32, "patch_size": 8, "num_blocks": 2, "embed_dim": 16}
# model, its arguments, pixels, heads that can go
MODELS = {
    "resnet": ("resnet10t", {}, 32, 0),
    "mobilenet": ("mobilenetv3_small_050", {}, 32, 0),
    "densenet": ("densenet121", {"block_config": (2, 2), "growth_rate": 8}, 32, 0),
    "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1)}, 32, 0),
    "mixer": ("mixer", MIXER, 32, 0),
    "vit": ("vit_tiny_patch16_224", {"depth": 2, "img_size": 32}, 32, 2),
    "swin": ("swin_tiny_patch4_window7_224", SWIN, 56, 3),
}


def build(family):
    name, arguments, pixels, _ = MODELS[family]
    torch.manual_seed(0)
    if name == "mixer":
        net = timm.models.mlp_mixer.MlpMixer(num_classes=5, **arguments)
    else:
        net = timm.create_model(name, num_classes=5, **arguments)
    return randomized(net), torch.randn(2, 3, pixels, pixels).double()


@pytest.mark.parametrize("family", MODELS)
def test_half_of_every_exact_group_is_exact(family):
    model, x = build(family)
    found = channels(model, x)
    assert not found.trace.unknown
    assert sum(g.kind == "head" for g in found.groups) == MODELS[family][3]
    dense = copy.deepcopy(model)
    result = shrink(model, x, "random", allocator={"*": 0.5}, measure=False)
    assert error(masked_copy(dense, found, result.gone), model, x) < 1e-9
    assert result.after.macs < 0.8 * result.before.macs


@pytest.mark.parametrize("family", ["vit", "swin", "convnext"])
def test_widths_under_layer_norms_are_verified_by_statistics_of_what_stays(family):
    model, x = build(family)
    result = shrink(model, x, "random", {"macs": 0.4}, width=True, measure=False)
    assert any(not row.exact for row in result.rows)
    assert result.after.macs <= 0.4 * result.before.macs


def test_code_that_takes_the_number_of_heads_from_elsewhere_is_refused_by_name():
    torch.manual_seed(0)
    model = timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1)).eval()
    x = torch.randn(1, 3, 64, 64)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"attn cannot be made smaller.*exclude"):
        shrink(model, x, target={"params": 0.5}, measure=False)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
