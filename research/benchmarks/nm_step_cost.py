"""What N:M training costs in each step.

A full training step (forward, backward, AdamW) of a small ViT, in variants that take turns in one
process: twice plain (the second shows the noise), sessions with `sr_ste` and `mdgf` within their
windows, and SR-STE as an autograd function that chooses the masks in each forward pass: by sorting
each group, as the published programs do, and by prunus' own selection.

    python -m research.benchmarks.nm_step_cost [--device cuda]
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import prunus
from prunus.solvers.selection import keep_highest_of_groups

from research.benchmarks.measure import add_options, hardware, print_table, seconds, spread

LAYERS = '["blocks.*.attn.qkv", "blocks.*.attn.proj", "blocks.*.mlp.fc*"]'
RECIPE = (
    "modifiers: [nm_training: {{layers: {layers}, pattern: '{pattern}', masking: {masking}, "
    "window: {{from: 0step, to: 1000000step}}}}]\n"
)
SESSIONS = {
    "session, sr_ste 2:4": ("2:4", "sr_ste"),
    "session, mdgf 2:4": ("2:4", "mdgf"),
    "session, sr_ste 1:16": ("1:16", "sr_ste"),
    "session, mdgf 1:16": ("1:16", "mdgf"),
}
FUNCTIONS = {
    "autograd, sr_ste 2:4, sorting": (2, 4, "sort"),
    "autograd, sr_ste 2:4, our selection": (2, 4, "ours"),
    "autograd, sr_ste 1:16, sorting": (1, 16, "sort"),
    "autograd, sr_ste 1:16, our selection": (1, 16, "ours"),
}
VARIANTS = ("plain", "plain again", *SESSIONS, *FUNCTIONS)


class SRSTE(torch.autograd.Function):
    """``m w`` forward, ``g + lambda (1 - m) w`` backward."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, n: int, m: int, how: str) -> Tensor:
        if how == "ours":
            mask = keep_highest_of_groups(w.abs(), n, m)
        else:
            groups = w.abs().reshape(-1, m)
            order = groups.argsort(1)
            mask = torch.ones_like(groups, dtype=torch.bool)
            mask = mask.scatter_(1, order[:, : m - n], False).reshape(w.shape)
        ctx.save_for_backward(w, mask)
        return w * mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        w, mask = ctx.saved_tensors
        return grad + 2e-4 * w.masked_fill(mask, 0), None, None, None


class Masked(nn.Module):
    """The parametrization that puts the function before each use of a weight."""

    def __init__(self, n: int, m: int, how: str) -> None:
        super().__init__()
        self.arguments = n, m, how

    def forward(self, w: Tensor) -> Tensor:
        masked: Tensor = SRSTE.apply(w, *self.arguments)
        return masked


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> Callable[[], None]:
    def step() -> None:
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def variants(args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    torch.manual_seed(0)
    model = timm.create_model(args.model, num_classes=1000, img_size=args.image_size)
    model.to(args.device)
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=args.device)
    labels = torch.randint(0, 1000, (args.batch_size,), device=args.device)
    steps = {}
    for name in VARIANTS:
        twin = copy.deepcopy(model)
        if name in FUNCTIONS:
            for path, module in twin.named_modules():
                if isinstance(module, nn.Linear) and path.startswith("blocks"):
                    parametrize.register_parametrization(
                        module, "weight", Masked(*FUNCTIONS[name]), unsafe=True
                    )
        optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-4)
        if name in SESSIONS:
            pattern, masking = SESSIONS[name]
            recipe = RECIPE.format(layers=LAYERS, pattern=pattern, masking=masking)
            prunus.attach(twin, optimizer, recipe)
        steps[name] = training_step(twin, optimizer, images, labels)
    return steps


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
        f"{args.model}, {args.batch_size} images of {args.image_size}x{args.image_size}, "
        f"{args.rounds} rounds\n"
    )

    steps = variants(args)
    for _ in range(3):
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
