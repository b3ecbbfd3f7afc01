"""Train a small vision transformer on scikit-learn's digits, then prune it in two ways.

Gradually, by `recipes/vit/magnitude-90.yaml`, and in one shot at several sparsities, by magnitude
and by `recipes/vit/cap-one-shot-50.yaml`. Prints a table and writes `report.html`. Takes about a
minute on one CPU core.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import prunus
from prunus.api.sweep_result import SweepResult

RECIPES = Path(__file__).parent.parent / "recipes" / "vit"
GRADUAL, ONE_SHOT = RECIPES / "magnitude-90.yaml", RECIPES / "cap-one-shot-50.yaml"
SPARSITIES = [0.5, 0.75, 0.9]
Data = tuple[Tensor, Tensor]


def digits(fold: int = 0) -> tuple[Data, Data]:
    """1,437 training and 360 test images of 8x8, with pixels in [-1, 1]; the five folds' test
    images are all of scikit-learn's."""
    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(raw.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    order = order.roll(-360 * fold)
    train, test = order[360:], order[:360]
    return (images[train], labels[train]), (images[test], labels[test])


def build() -> VisionTransformer:
    """A transformer of 200,000 weights on 16 patches of 2x2 pixels."""
    return VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=64, depth=4, num_heads=4
    )


def batches(data: Data) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(*data), batch_size=64, shuffle=True, drop_last=True)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def train_dense(model: nn.Module, data: Data, epochs: int) -> None:
    loader = batches(data)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=4e-3, epochs=epochs, steps_per_epoch=len(loader), pct_start=0.2
    )
    for _ in track(range(epochs), "training"):
        for x, y in loader:
            step(model.train(), optimizer, x, y)
            schedule.step()


def train_gradual(model: nn.Module, data: Data, test: Data, epochs: int) -> prunus.Session:
    """A loop as anybody writes it; the recipe sets sparsity and learning rate."""
    loader = batches(data)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    with prunus.attach(
        model, optimizer, GRADUAL, steps_per_epoch=len(loader), epochs=epochs
    ) as session:
        for _ in track(range(epochs), "pruning while training"):
            for x, y in loader:
                loss = step(model.train(), optimizer, x, y)
            session.log(loss=loss, accuracy=accuracy(model, test))
    return session


def prune_at_once(model: nn.Module, data: Data, test: Data) -> list[SweepResult]:
    """Magnitude, and CAP as its recipe says, with gradients of batches of eight."""
    x, y = data
    calibration = prunus.Calibration(
        list(zip(x.split(8), y.split(8), strict=True)), nn.functional.cross_entropy
    )
    cap = prunus.Recipe.load(ONE_SHOT).modifiers[0].pruner
    return [
        prunus.sweep(
            model,
            pruner,
            SPARSITIES,
            lambda m: {"accuracy": accuracy(m, test)},
            calibration=calibration,
        )
        for pruner in ("magnitude", cap)
    ]


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    x, y = data
    return float((model.eval()(x).argmax(1) == y).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    parser.add_argument("--epochs", type=int, default=30, help="of dense training")
    parser.add_argument("--prune-epochs", type=int, default=30, help="of gradual pruning")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a model this small gains nothing from more
    begin, console = time.monotonic(), Console()
    train_data, test_data = digits()

    torch.manual_seed(0)
    dense = build()
    train_dense(dense, train_data, args.epochs)
    one_shot = prune_at_once(dense, train_data, test_data)
    gradual = copy.deepcopy(dense)
    session = train_gradual(gradual, train_data, test_data, args.prune_epochs)

    args.output.mkdir(parents=True, exist_ok=True)
    prunus.save(dense, args.output / "dense.safetensors")
    prunus.save(gradual, args.output / "gradual.safetensors", pruning=session, compact=True)
    sizes = [(args.output / f"{n}.safetensors").stat().st_size for n in ("dense", "gradual")]
    table = Table("model", "sparsity", "accuracy", "file", title="digits", title_justify="left")
    table.add_row(
        "dense", "0.00", f"{accuracy(dense, test_data):.3f}", f"{sizes[0] / 1024:.0f} KiB"
    )
    for name, result in zip(("magnitude", "CAP"), one_shot, strict=True):
        for sparsity, metrics in result.values.items():
            row = f"{sparsity:.2f}", f"{metrics['accuracy']:.3f}"
            table.add_row(f"{name}, one shot", *row, "")
        for event in result.recorder.events:
            session.recorder(event)
    row = f"{session.sparsity:.2f}", f"{accuracy(gradual, test_data):.3f}"
    table.add_row("magnitude, gradual", *row, f"{sizes[1] / 1024:.0f} KiB")
    console.print(table)
    session.report(args.output)
    console.print(f"{args.output / 'report.html'}  ({time.monotonic() - begin:.0f} s)")


if __name__ == "__main__":
    main()
