"""What N:M training costs in accuracy: SR-STE, decaying masks and decaying structures.

A small vision transformer is trained from scratch, dense and to N:M in all layers of its blocks,
with several seeds. With `--data` on the first images of CIFAR-10, JPEG-encoded, with its whole test
set; else half of scikit-learn's digits train it and the other half test it. Runs that a former call
has finished are read from the output folder.

    python -m research.benchmarks.nm_accuracy --threads 1 --data FILE
    python -m research.benchmarks.nm_accuracy --device cuda --data FILE --images 50000 \\
        --epochs 100 --patch-size 4 --embed-dim 256 --depth 6
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.progress import track
from sklearn.datasets import load_digits
from timm.models import VisionTransformer
from torch import Tensor, nn

import prunus

from research.benchmarks.measure import add_options, hardware, print_table
from research.benchmarks.resnet20_cifar10 import read_images

WINDOW = "window: {from: 5%, to: 80%}"
EXPONENTIAL = "name: mdgf, decay: exponential"
METHODS = {
    "SR-STE": f"masking: sr_ste, {WINDOW}",
    "MDGF linear, scaled": f"masking: mdgf, {WINDOW}",
    "MDGF linear, ste": f"masking: {{name: mdgf, gradient: ste}}, {WINDOW}",
    "MDGF exponential, scaled": f"masking: {{{EXPONENTIAL}}}, {WINDOW}",
    "MDGF exponential, ste": f"masking: {{{EXPONENTIAL}, gradient: ste}}, {WINDOW}",
    "SdGF stepwise": f"masking: ste, structure: stepwise, {WINDOW}",
    "SdGF geometric": f"masking: ste, structure: geometric, {WINDOW}",
}
DENSE = "dense"
Data = tuple[Tensor, Tensor, Tensor, Tensor]


def digits() -> Data:
    """Half of the 1,797 images of 8x8 for training, half for testing."""
    raw = load_digits()
    x = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    y = torch.tensor(raw.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, test = order[:899], order[899:]
    return x[train], y[train], x[test], y[test]


def build(images: Tensor, args: argparse.Namespace) -> VisionTransformer:
    return VisionTransformer(
        img_size=images.shape[-1],
        patch_size=args.patch_size or images.shape[-1] // 4,
        in_chans=images.shape[1],
        num_classes=10,
        embed_dim=args.embed_dim,
        depth=args.depth,
        num_heads=4,
    )


def shuffled(x: Tensor, y: Tensor, args: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(x)).to(x.device)
    for batch in order[: len(x) // args.batch_size * args.batch_size].split(args.batch_size):
        images = x[batch]
        if args.data:  # mirrored and shifted by up to four pixels
            images = images.flip(3) if torch.rand(()) < 0.5 else images
            down, right = torch.randint(-4, 5, (2,)).tolist()
            images = images.roll((down, right), (2, 3))
        yield images, y[batch]


def train(
    method: str, pattern: str, seed: int, data: Data, args: argparse.Namespace
) -> list[float]:
    """Test accuracy, test loss and seconds."""
    torch.manual_seed(seed)
    begin = time.perf_counter()
    x, y, test_x, test_y = data
    model = build(x, args).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    steps = len(x) // args.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, epochs=args.epochs, steps_per_epoch=steps, pct_start=0.1
    )
    session = None
    if method != DENSE:
        entry = f"layers: ['blocks.*'], pattern: '{pattern}', {METHODS[method]}"
        recipe = f"modifiers: [prune: {{{entry}}}]"
        length = {"steps_per_epoch": steps, "epochs": args.epochs}
        session = prunus.attach(model, optimizer, recipe, **length)
    for _ in range(args.epochs):
        for images, labels in shuffled(x, y, args):
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    if session is not None:
        session.close()
        check(model, pattern)
    model.eval()
    with torch.no_grad():
        outputs = torch.cat([model(part) for part in test_x.split(1000)])
    accuracy = (outputs.argmax(1) == test_y).float().mean().item()
    loss = nn.functional.cross_entropy(outputs, test_y).item()
    return [accuracy, loss, time.perf_counter() - begin]


def check(model: nn.Module, pattern: str) -> None:
    n, m = map(int, pattern.split(":"))
    for name, p in model.named_parameters():
        if "blocks" in name and p.dim() == 2:
            kept = (p.detach().reshape(-1, m) != 0).sum(1)
            assert int(kept.max()) <= n, f"{name} is not {pattern}"


def finished(path: Path) -> dict[tuple[str, str, int], list[float]]:
    if not path.exists():
        return {}
    with path.open() as file:
        return {(m, p, int(s)): list(map(float, values)) for m, p, s, *values in csv.reader(file)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_options(parser)
    parser.add_argument("--data", type=Path, help="CIFAR-10 as a tar file of JPEG images")
    parser.add_argument("--images", type=int, default=10000, help="to train on, of CIFAR-10")
    parser.add_argument("--patch-size", type=int, help="default: 4 x 4 patches in all")
    parser.add_argument("--embed-dim", type=int, default=64)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--patterns", nargs="+", default=["2:4", "1:4", "1:8", "1:16"])
    parser.add_argument("--output", type=Path, default=Path("runs/nm_accuracy"))
    args = parser.parse_args()
    print(hardware(args))
    data = digits()
    if args.data:
        x, y = read_images(args.data, "train")
        first = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[: args.images]
        data = (x[first], y[first], *read_images(args.data, "val"))
    data = tuple(t.to(args.device) for t in data)
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / ("cifar10.csv" if args.data else "digits.csv")
    done = finished(path)
    runs = [(DENSE, "", seed) for seed in range(args.seeds)]
    runs += [(m, p, s) for s in range(args.seeds) for m in METHODS for p in args.patterns]
    for run in track([run for run in runs if run not in done], "training"):
        done[run] = train(*run, data, args)
        with path.open("a") as file:
            csv.writer(file).writerow([*run, *done[run]])
    show(done, args)


def show(done: dict[tuple[str, str, int], list[float]], args: argparse.Namespace) -> None:
    def cell(method: str, pattern: str) -> str:
        values = [done[method, pattern, seed] for seed in range(args.seeds)]
        accuracies = [100 * v[0] for v in values]
        loss = statistics.mean(v[1] for v in values)
        return (
            f"{statistics.mean(accuracies):.1f} ± {statistics.stdev(accuracies):.1f} ({loss:.3f})"
        )

    print(f"{args.seeds} seeds, {args.epochs} epochs, {args.embed_dim} wide, {args.depth} blocks")
    print("top-1 in %, mean ± deviation (test loss)")
    print(f"dense: {cell(DENSE, '')}\n")
    rows = [(method, *(cell(method, p) for p in args.patterns)) for method in METHODS]
    print_table(("", *args.patterns), rows)


if __name__ == "__main__":
    main()
