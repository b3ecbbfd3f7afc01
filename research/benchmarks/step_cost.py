"""What a session costs between pruning steps.

A full training step (forward, backward, AdamW) of a small ViT, in five variants that take turns in
one process: twice plain (the second shows the noise), with a session that holds 75 % of the
weights at zero, with a session that has not begun, and with `torch.nn.utils.prune`, which computes
``weight_orig * weight_mask`` in every forward pass.

    python -m research.benchmarks.step_cost [--device cuda]
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable

import timm
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import prunus

from research.benchmarks.measure import add_options, hardware, print_table, seconds, spread

SPARSITY = 0.75
RECIPE = "modifiers: [prune: {{sparsity: {sparsity}, window: {{from: {begin}}}}}]\n"


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor
) -> Callable[[], None]:
    def step() -> None:
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def variants(args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    torch.manual_seed(0)
    options = {"img_size": args.image_size} if "vit" in args.model else {}
    model = timm.create_model(args.model, num_classes=1000, **options).to(args.device)
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=args.device)
    labels = torch.randint(0, 1000, (args.batch_size,), device=args.device)
    steps = {}
    for name in ("plain", "plain again", "session, masked", "session, waiting", "torch.nn.utils"):
        twin = copy.deepcopy(model)
        if name == "torch.nn.utils":
            mask_with_torch(twin)
        optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-4)
        if name.startswith("session"):
            begin = "0step" if name.endswith("masked") else "1000000step"
            prunus.attach(twin, optimizer, RECIPE.format(sparsity=SPARSITY, begin=begin))
        steps[name] = training_step(twin, optimizer, images, labels)
    return steps


def mask_with_torch(model: nn.Module) -> None:
    """The same sparsity in the same layers: all Linear and convolutions but stem and head."""
    spared = {"patch_embed.proj", "head"}
    chosen = [
        (module, "weight")
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and name not in spared
    ]
    torch_prune.global_unstructured(chosen, torch_prune.L1Unstructured, amount=SPARSITY)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_options(parser)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    print(hardware(args))
    print(
        f"{args.model}, {args.batch_size} images of {args.image_size}x{args.image_size}, ", end=""
    )
    print(f"{args.rounds} rounds\n")

    steps = variants(args)
    for _ in range(3):  # the first of them prunes
        for step in steps.values():
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for i in range(args.rounds):
        # each round begins with another variant, so that none always follows the same one
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(seconds(steps[name], args))

    rows = []
    plain = times["plain"]
    for name, values in times.items():
        ratios = [value / base for value, base in zip(values, plain, strict=True)]
        middle = statistics.median(values)
        ratio = f"{middle / statistics.median(plain):.3f}"
        rows.append((name, f"{1000 * middle:.1f}", ratio, spread(ratios)))
    print_table(("step", "median ms", "ratio of medians", "middle half of ratios"), rows)


if __name__ == "__main__":
    main()
