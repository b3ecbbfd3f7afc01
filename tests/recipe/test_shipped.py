"""What ships with the repository runs: the demo and every recipe."""

import functools
import re

import pytest
import timm
import torch
from timm.models import ConvNeXt, EfficientNet, ResNet, SwinTransformer, VisionTransformer
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.resnet import Bottleneck
from torch import nn

import prunus
from prunus.core.layers import all_layers
from prunus.core.patterns import parse_pattern
from prunus.modifiers import Context, OneShotModifier

from tests.helpers.programs import run_module
from tests.oracles.pruning import ROOT

RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
STEPS, EPOCHS = 4, 5


def recipes(paths):
    return pytest.mark.parametrize(
        "path", paths, ids=lambda path: f"{path.parent.name}-{path.stem}"
    )


def small_vit(width=16):
    return VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, embed_dim=width, depth=2, num_heads=2, num_classes=3
    )


def small_swin(width=8):
    return SwinTransformer(
        img_size=16,
        patch_size=2,
        window_size=4,
        in_chans=1,
        embed_dim=width,
        depths=(1, 2),
        num_heads=(1, 2),
        num_classes=3,
    )


def small_convnext():
    return ConvNeXt(in_chans=1, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=3)


def small_resnet():
    return ResNet(Bottleneck, (1, 1, 1, 1), in_chans=1, channels=(4, 4, 8, 8), num_classes=3)


def small_efficientnet():
    blocks = [["ds_r1_k3_s1_e1_c8_se0.25"], ["ir_r2_k3_s2_e4_c16_se0.25"]]
    return EfficientNet(
        decode_arch_def(blocks), in_chans=1, stem_size=8, num_features=32, num_classes=3
    )


# family: (a small model, the side of its images)
MODELS = {
    "vit": (small_vit, 8),
    "swin": (small_swin, 16),
    "convnext": (small_convnext, 32),
    "resnet": (small_resnet, 16),
    "efficientnet": (small_efficientnet, 8),
}

# test_shipped_llm.py runs the other families
VISION = [path for path in RECIPES if path.parent.name in MODELS]
NM = [path for path in VISION if path.stem.startswith("nm-")]
PRUNING = [path for path in VISION if re.search("- (prune|nm_training):", path.read_text())]
FINE_TUNING = [path for path in VISION if path not in PRUNING]
# what permutes is for finished models
TRAINED = [path for path in PRUNING if "permute:" not in path.read_text()]

# family: (models of timm, what its recipes leave dense in them)
NAMED = {
    "vit": (
        ["vit_small_patch16_224", "deit_small_distilled_patch16_224", "deit3_small_patch16_224"],
        r"patch_embed\.proj|head|head_dist",
    ),
    "swin": (
        ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"],
        r"patch_embed\.proj|layers\..*\.cpb_mlp\..*|head\.fc",
    ),
    "convnext": (
        ["convnext_tiny", "convnext_tiny_hnf", "convnextv2_tiny"],
        r"stem\.0|stages\..*\.conv_dw|head\.fc",
    ),
    "resnet": (["resnet18", "resnet50", "resnet50d"], r"conv1(\.\d)?|fc"),
    "efficientnet": (
        ["efficientnet_b0", "tf_efficientnetv2_s", "mobilenetv3_large_100"],
        r"conv_stem|blocks\..*\.conv_dw|classifier",
    ),
}


@functools.cache
def of_timm(name):
    with torch.device("meta"):
        return timm.create_model(name)


def batch_of(path):
    side = MODELS[path.parent.name][1]
    return torch.randn(4, 1, side, side), torch.randint(3, (4,))


def setting(path, width=None):
    """A small model of the recipe's family and data to calibrate on."""
    batches = [batch_of(path) for _ in range(3)]
    build = MODELS[path.parent.name][0]
    model = build() if width is None else build(width)
    return model, prunus.Calibration(batches, nn.functional.cross_entropy)


def prunings(recipe):
    return [m for m in recipe.modifiers if isinstance(m, OneShotModifier)]


def target_of(*modifiers):
    """The sparsity at the end, the same in all entries."""
    fixed = (parse_pattern(m.pattern).fixed for m in modifiers)
    (target,) = {m.final_sparsity or f for m, f in zip(modifiers, fixed, strict=True)}
    return target


def trained(path, width=None, steps=STEPS, **variables):
    """The session of a whole training run by the recipe, and the learning rate of each step."""
    model, calibration = setting(path, width)
    recipe = prunus.Recipe.load(path, **variables)
    return trained_from(model, calibration, path, recipe, steps)


def trained_from(model, calibration, path, recipe, steps=STEPS):
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    rates = []
    with prunus.attach(
        model, optimizer, recipe, steps_per_epoch=steps, epochs=EPOCHS, calibration=calibration
    ) as session:
        for _ in range(steps * EPOCHS):
            x, y = batch_of(path)
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            rates.append(optimizer.param_groups[0]["lr"])
    return session, rates


@recipes(TRAINED)
def test_every_recipe_matches_its_family_and_runs_to_its_target(path, caplog):
    session, _ = trained(path)
    assert session.sparsity == pytest.approx(target_of(*prunings(session.recipe)), abs=1e-3)
    assert "matches nothing" not in caplog.text


PATTERNS = ("1:4", "1:8", "1:16", "1:32", "2:4")


@pytest.mark.parametrize("pattern", PATTERNS)
@recipes(NM)
def test_every_recipe_of_nm_training_ends_at_every_pattern(path, pattern):
    whole = "qkv_pattern" in path.read_text()
    more = {"qkv_pattern": "2:4"} if whole else {}
    session, _ = trained(path, 32, steps=2, pattern=pattern, **more)
    fed = [name for name in session.masks if "mlp.fc" in name]
    fused = [name for name in session.masks if "attn.qkv" in name]
    assert len(fed) + len(fused) == len(session.masks)
    assert bool(fused) == whole
    for name in session.masks:
        n, m = map(int, pattern.split(":")) if name in fed else (2, 4)
        zeros = session.model.get_parameter(name) == 0
        assert (zeros.reshape(-1, m).sum(1) == m - n).all(), name


@recipes([path for path in RECIPES if "-gradual-" in path.stem])
def test_a_gradual_recipe_begins_a_cycle_of_the_learning_rate_with_each_pruning_step(path):
    session, rates = trained(path)
    events = [event for event in session.recorder.events if event["event"] == "prune"]
    assert [event["step"] for event in events] == [1, 5, 10, 15]
    assert [event["target"] for event in events] == [0.5, 0.6, 0.75, 0.9]
    assert [i for i in range(1, len(rates)) if rates[i] > rates[i - 1]] == [5, 10, 15]


@recipes(FINE_TUNING)
def test_a_fine_tuning_recipe_keeps_what_the_others_of_its_family_prune(path, caplog):
    model, calibration = setting(path)
    one_shot = path.with_name("cap-one-shot-50.yaml")
    masks = prunus.prune(model, one_shot, calibration=calibration).masks
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    session, rates = trained_from(model, calibration, path, path)
    assert session.masks.keys() == masks.keys()
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        assert torch.equal(session.masks[name], mask)
        assert (weight[~mask] == 0).all()
    # some only: ConvNeXt scales its blocks by 1e-6
    assert any((model.get_parameter(n)[m] != before[n][m]).any() for n, m in masks.items())
    assert rates == sorted(rates, reverse=True)
    assert "matches nothing" not in caplog.text


@recipes(PRUNING)
def test_every_recipe_prunes_a_finished_model(path):
    model, calibration = setting(path)
    result = prunus.prune(model, path, calibration=calibration)
    assert result.sparsity == pytest.approx(target_of(*prunings(result.recipe)), abs=1e-3)


@recipes(VISION)
def test_every_recipe_leaves_dense_in_the_models_of_timm_what_it_should(path, caplog):
    names, dense = NAMED[path.parent.name]
    if path in NM:
        dense += r"|.*\.attn\.proj|.*\.downsample\.reduction"
        dense += "" if "qkv" in path.stem else r"|.*\.attn\.qkv"
    for name in names:
        model = of_timm(name)
        taken = set()
        for modifier in prunus.Recipe.load(path).modifiers:
            if isinstance(modifier, OneShotModifier):
                taken |= {layer.parameter_name for layer in modifier.plan(model).layers}
            elif modifier.name == "keep":
                context = Context(model, torch.optim.SGD(model.parameters(), 0.1))
                taken |= {layer.parameter_name for layer in modifier.bind(context).layers}
        left = [layer.name for layer in all_layers(model) if layer.parameter_name not in taken]
        assert not [layer for layer in left if not re.fullmatch(dense, layer)], name
        assert path in NM or len(taken) > len(left)
    assert "matches nothing" not in caplog.text


@pytest.mark.parametrize("family", MODELS)
def test_every_family_has_cap_in_one_shot_with_fine_tuning_gradually_and_fine_tuning_alone(family):
    names = {path.stem for path in RECIPES if path.parent.name == family}
    assert {"cap-one-shot-50", "cap-one-shot-75-finetune", "cap-gradual-90", "finetune"} <= names


@recipes(RECIPES)
def test_every_recipe_says_what_it_is_for_and_is_short(path):
    lines = path.read_text().splitlines()
    assert re.fullmatch(r"# [A-Z0-9].*\.", lines[0])
    assert lines[1].startswith("# ")
    assert len(lines) <= 21


def test_the_demo_prints_its_table_and_writes_its_report(tmp_path):
    arguments = ["--output", str(tmp_path), "--epochs", "1", "--prune-epochs", "2"]
    done = run_module("research.demo", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split("│") for line in done.stdout.splitlines() if line.startswith("│")]
    assert [row[1].strip() for row in rows] == [
        "dense",
        *["magnitude, one shot"] * 3,
        *["CAP, one shot"] * 3,
        "magnitude, gradual",
    ]
    assert rows[-1][2].strip() == "0.90"
    assert (tmp_path / "report.html").is_file()
    compact, dense = (tmp_path / f"{n}.safetensors" for n in ("gradual", "dense"))
    assert compact.stat().st_size < dense.stat().st_size / 4
