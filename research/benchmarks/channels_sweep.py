"""Half of every group of many timm models: is the small model what the masked one is?

Each line says ``exact`` with the largest relative difference, or ``refused`` with the reason; a
model that computes something else is an error of ours, and the program says so and exits with 1.

    python -m research.benchmarks.channels_sweep [models...]
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import timm
import torch
from torch import nn

from prunus.channels import channels, shrink
from prunus.channels.surgery import gone_mask
from prunus.channels.verify import masked, outputs, probes, relative_error

from research.benchmarks.measure import add_options, hardware

MODELS = [
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "regnetx_002",
    "regnety_002",
    "densenet121",
    "vgg11_bn",
    "mobilenetv2_050",
    "mobilenetv3_small_100",
    "efficientnet_b0",
    "ghostnet_050",
    "inception_v3",
    "dla34",
    "hrnet_w18_small",
    "res2net50_14w_8s",
    "repvgg_a0",
    "nfnet_l0",
    "convnext_atto",
    "convnextv2_atto",
    "poolformer_s12",
    "mixer_s32_224",
    "resmlp_12_224",
    "gmlp_s16_224",
    "vit_tiny_patch16_224",
    "deit3_small_patch16_224",
    "beit_base_patch16_224",
    "eva02_tiny_patch14_224",
    "cait_xxs24_224",
    "swin_tiny_patch4_window7_224",
    "maxvit_tiny_rw_224",
    "levit_128s",
    "tiny_vit_5m_224",
    "mobilevit_xxs",
    "xcit_nano_12_p16_224",
    "fastvit_t8",
    "efficientformer_l1",
    "pvt_v2_b0",
    "coat_tiny",
    "crossvit_tiny_240",
    "edgenext_xx_small",
]


def prepare(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model: Any = timm.create_model(name).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_()  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    for p in model.parameters():
        if p.dim() == 1 or not p.any():
            p.data += 0.1 * torch.randn_like(p)
    return model, torch.randn(1, *model.default_cfg["input_size"])


def judged(model: nn.Module, x: torch.Tensor) -> tuple[str, bool]:
    """What came of halving it, and whether that is right."""
    found = channels(model, x)
    inputs = probes(x)
    try:
        result = shrink(
            model, x, "random", allocator={"*": 0.5}, width=True, verify=True, measure=False
        )
    except ValueError as error:
        again = shrink_without_heads(model, x)
        return f"refused: {error}; {again}", "something else" not in str(error)
    small = outputs(model, inputs)
    fresh, _ = prepare(model.default_cfg["architecture"])  # type: ignore[index,arg-type]
    with masked(fresh, found, gone_mask(found, result.gone)):
        error = relative_error(outputs(fresh, inputs)[0][0], small[0][0])
    macs = result.before.macs / result.after.macs
    params = result.before.params / result.after.params
    return f"exact ({error:.0e}), MACs/{macs:.2f}, parameters/{params:.2f}", error < 1e-4


def shrink_without_heads(model: nn.Module, x: torch.Tensor) -> str:
    """The same but for heads, whose number the code may not take from anywhere."""
    found = channels(model, x)
    table = {g.name: 0.5 for g in found.groups if g.kind == "channel" and not g.norms}
    try:
        result = shrink(
            model, x, "random", allocator=table, layers=list(table), measure=False, verify=True
        )
    except ValueError as error:
        return f"without heads and widths also: {error}"
    return f"exact without heads and widths, MACs/{result.before.macs / result.after.macs:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add_options(parser)
    parser.add_argument("models", nargs="*", default=MODELS)
    args = parser.parse_args()
    print(hardware(args), f"timm {timm.__version__}")
    wrong = 0
    for name in args.models:
        model, x = prepare(name)
        begin = time.process_time()
        found = channels(model, x)
        seconds = time.process_time() - begin
        verdict, right = judged(model, x)
        wrong += not right
        kinds = {k: sum(g.kind == k for g in found.groups) for k in ("channel", "head", "kv_group")}
        counts = ", ".join(f"{n} {k}" for k, n in kinds.items() if n)
        print(f"{name}: {counts} groups in {seconds:.1f} s of CPU; {verdict}", flush=True)
    print(f"{len(args.models)} models, {wrong} wrong")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
