"""Time per epoch of `sparse_training.py` against timm's training without a session.

Both train the same model on digits, resized to the model's images, with timm's loader, loss and
optimizer; epochs take turns in one process. The program prunes to 75 % after its first step, so
that what is timed lies between pruning steps. Its epoch also makes random numbers reproducible. The
second plain loop shows the noise.

    python -m research.benchmarks.program_overhead [--model NAME] [--rounds 10] [--device cuda]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from timm.data import create_loader, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import AverageMeter

from prunus.core.ranks import Ranks

from research import sparse_training
from research.benchmarks.measure import add_options, hardware, print_table, seconds, spread
from research.common import vision_data, vision_models
from research.training import options as training_options

RECIPE = "modifiers:\n  - prune: {sparsity: 0.75}\n"


def of_timm(args: argparse.Namespace) -> Callable[[], None]:
    """An epoch as timm's train.py makes it."""
    device, model = torch.device(args.device), vision_models.create(args.model, pretrained=False)
    model.to(device)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-4, weight_decay=0.05)
    config = resolve_data_config({}, model=model)
    config.pop("crop_mode")
    images = vision_data.open_dataset("digits", "", "train", config["input_size"][0])
    loader = create_loader(
        images,
        batch_size=args.batch_size,
        is_training=True,
        no_aug=True,
        num_workers=0,
        device=device,
        **config,
    )
    loss_fn = LabelSmoothingCrossEntropy(0.1)

    def epoch() -> None:
        meter = AverageMeter()
        model.train()
        for x, y in loader:
            loss = loss_fn(model(x), y)
            loss.backward()
            optimizer.step()
            meter.update(loss.item(), len(x))
            optimizer.zero_grad()

    return epoch


def of_the_program(args: argparse.Namespace, folder: str, recipe: str) -> Callable[[], None]:
    path = Path(folder) / f"{len(recipe)}.yaml"
    path.write_text(recipe)
    command = ["--model", args.model, "--no-pretrained", "--recipe", str(path), "--no-aug"]
    command += ["--opt", "adamw", "--lr", "1e-4", "--weight-decay", "0.05", "--sched", "none"]
    command += ["-b", str(args.batch_size), "--smoothing", "0.1", "--device", args.device]
    command += ["--output", folder, "--experiment", path.stem]
    options = training_options.parse(command)
    training = sparse_training.Training(options, Ranks(), torch.device(args.device))

    def epoch() -> None:
        training.batch = 0
        training._train_epoch()

    return epoch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_options(parser)
    parser.add_argument("--model", default="digits_vit")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    print(hardware(args))
    print(f"{args.model}, 1,437 digits in batches of {args.batch_size}, {args.rounds} rounds\n")
    with tempfile.TemporaryDirectory() as folder:
        waiting = RECIPE.replace("0.75", "0.75, window: {from: 1000ep}")
        epochs = {
            "timm": of_timm(args),
            "timm again": of_timm(args),
            "the program, masked": of_the_program(args, folder, RECIPE),
            "the program, waiting": of_the_program(args, folder, waiting),
        }
        for epoch in epochs.values():  # the masked one prunes here
            epoch()
        rounds = [{n: seconds(e, args) for n, e in epochs.items()} for _ in range(args.rounds)]
    base = statistics.median(r["timm"] for r in rounds)
    rows = []
    for name in epochs:
        ratios = [r[name] / r["timm"] for r in rounds]
        median = statistics.median(r[name] for r in rounds)
        rows.append((name, f"{median:.3f}", f"{median / base:.3f}", spread(ratios)))
    print_table(("epoch", "median s", "ratio of medians", "middle half of ratios"), rows)
    print("Goal: at most 1.03 with a session.")


if __name__ == "__main__":
    main()
