"""Vision models by name: timm's, and two small ones for digits, trained when first asked for.

Importing this file registers ``digits_vit`` and ``digits_resnet`` with timm.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from textwrap import shorten
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.models import ResNet, VisionTransformer, load_checkpoint, register_model
from timm.models.resnet import BasicBlock
from torch import nn

import prunus
from prunus.core.names import did_you_mean
from prunus.core.ranks import Ranks

from research import demo

FOLDER = "runs/digits"
EPOCHS = 30  # of training a digits model
CONFIG = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0}
UNREADABLE = (RuntimeError, EOFError, UnpicklingError, SafetensorError)
NOT_OURS = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


@register_model
def digits_vit(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """200,000 weights on 16 patches of 2x2 pixels."""
    shape = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10}
    shape |= {"embed_dim": 64, "depth": 4, "num_heads": 4}
    return _configured(VisionTransformer(**{**shape, **_own(kwargs)}))


@register_model
def digits_resnet(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """175,000 weights in three stages of two blocks, whose stem keeps all 8x8 pixels."""
    shape = {"in_chans": 1, "num_classes": 10, "channels": (16, 32, 64)}
    settings = {**shape, **_own(kwargs)}
    model = ResNet(BasicBlock, (2, 2, 2), **settings)
    model.conv1 = nn.Conv2d(settings["in_chans"], model.conv1.out_channels, 3, 1, 1, bias=False)
    model.maxpool, model.layer4 = nn.Identity(), nn.Identity()
    return _configured(model)


def _own(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key not in NOT_OURS}


def _configured(model: Any) -> nn.Module:
    model.pretrained_cfg = model.default_cfg = {**CONFIG, "interpolation": "bilinear"}
    return model


DIGITS_MODELS = ("digits_vit", "digits_resnet")


def trained_on_digits(name: str, folder: str | Path, ranks: Ranks) -> str:
    """The file with the weights of a digits model, which the first rank trains if there is none."""
    path = Path(folder) / f"{name}.safetensors"
    with ranks.raise_on_all_ranks():  # the others wait here
        if ranks.rank == 0 and not path.is_file():
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = timm.create_model(name)
                demo.train_dense(model, demo.digits()[0], EPOCHS)
            prunus.save(model, path)
    return str(path)


def create(
    name: str,
    *,
    pretrained: bool,
    checkpoint: str = "",
    folder: str | Path = FOLDER,
    ranks: Ranks | None = None,
    option: str = "--initial-checkpoint",
    **options: Any,
) -> Any:
    """A model of timm, with its pretrained weights, with those of a file, or with random ones.

    Raises ValueError for a name timm does not know, and for a file, which was given with `option`,
    that is not there or does not fit.
    """
    # names with a colon are of models that are not timm's own
    if ":" not in name and not timm.is_model(name.rpartition("/")[2]):
        near = did_you_mean(name, timm.list_models())
        raise ValueError(f"--model {name}: timm has no such model{near}")
    origin = f"{option} {checkpoint}" if checkpoint else f"--model {name}"
    if checkpoint and not Path(checkpoint).is_file():
        raise ValueError(f"{origin} is not a file; give one with weights")
    if pretrained and not checkpoint and name in DIGITS_MODELS:
        if (classes := options.get("num_classes", 10)) != 10:
            raise ValueError(
                f"--num-classes {classes}: the weights trained on digits are for 10; leave it out, "
                f"or give {option} weights for {classes}"
            )
        checkpoint = trained_on_digits(name, folder, ranks or Ranks())
    pretrained = pretrained and not checkpoint
    model = timm.create_model(name, pretrained=pretrained, **options)
    if checkpoint:
        try:
            load_checkpoint(model, checkpoint)
        except UNREADABLE as error:
            said = shorten(str(error), 300) or type(error).__name__
            raise ValueError(
                f"{origin}: no weights for this model, with its --num-classes and --model-kwargs: "
                f"{said}"
            ) from error
    return model
