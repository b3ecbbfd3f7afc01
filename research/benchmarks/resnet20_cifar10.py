"""One-shot magnitude pruning of the CIFAR ResNet-20, with the accuracies it should give.

He et al., "Deep residual learning for image recognition", 2015, https://arxiv.org/abs/1512.03385,
section 4.2: three stages of three basic blocks with 16, 32 and 64 channels, and shortcuts without
weights (option A). Pruned are the 18 convolutions in the blocks, ranked together; nothing is
trained afterwards. The first rows have accuracies to compare with, the others are for interest.

    python -m research.benchmarks.resnet20_cifar10 [--weights FILE] [--data FILE] [--device cuda]

The weights are a safetensors file, the data a tar of ``cifar10-jpeg/val/<class>/*.jpg``.
"""

from __future__ import annotations

import argparse
import copy
import io
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import prunus

from research.benchmarks.measure import add_options, hardware, print_table

SHARED = Path(__file__).resolve().parents[3] / "shared"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SPARSITIES = (0.5, 0.75, 0.9)
EXPECTED = {0.0: 0.880, 0.5: 0.847, 0.75: 0.599, 0.9: 0.115}
TOLERANCE = 0.005


class Block(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.more = stride, channels - channels_in

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.more:  # option A: every other pixel, and channels of zeros on both sides
            x = x[:, :, :: self.stride, :: self.stride]
            x = F.pad(x, (0, 0, 0, 0, self.more // 2, self.more // 2))
        return F.relu(out + x)


class ResNet20(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16, 16, 1), Block(16, 16, 1), Block(16, 16, 1))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def read_images(archive: Path, split: str) -> tuple[Tensor, Tensor]:
    """All images of a split, normalized, and their classes in alphabetical order."""
    images, names = [], []
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = Path(member.name).parts
            if member.isfile() and len(parts) == 4 and parts[1] == split:
                images.append(np.asarray(Image.open(io.BytesIO(tar.extractfile(member).read()))))
                names.append(parts[2])
    classes = {name: i for i, name in enumerate(sorted(set(names)))}
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    x = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    return x, torch.tensor([classes[name] for name in names])


@torch.no_grad()
def top1(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    batches = zip(images.split(500), labels.split(500), strict=True)
    return sum(int((model(x).argmax(1) == y).sum()) for x, y in batches) / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_options(parser)
    weights = SHARED / "models" / "resnet20-cifar10-jpeg.safetensors"
    parser.add_argument("--weights", type=Path, default=weights)
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "cifar10-jpeg.tar.gz")
    args = parser.parse_args()
    print(hardware(args))

    model = ResNet20()
    model.load_state_dict(load_file(args.weights))
    model.to(args.device)
    images, labels = (t.to(args.device) for t in read_images(args.data, "val"))
    print(f"{len(labels)} images\n")

    def accuracy(model: nn.Module) -> float:
        return top1(model, images, labels)

    def compared(sparsity: float, measured: float) -> tuple[str, str]:
        expected = EXPECTED[sparsity]
        verdict = "yes" if abs(measured - expected) <= TOLERANCE else "NO"
        return f"{expected:.3f}", verdict

    chosen = {"layers": ["Conv2d"], "exclude": ["conv1"]}
    dense = accuracy(model)
    rows = [("dense", "", "0", f"{dense:.4f}", *compared(0.0, dense))]
    runs = (
        ("unstructured", "global"),
        ("unstructured", "uniform"),
        ("unstructured", "erk"),
        ("row", "uniform"),
        ("4x1", "global"),
        ("1x4", "global"),
    )
    for pattern, allocator in runs:
        result = prunus.sweep(
            model, "magnitude", SPARSITIES, accuracy, pattern=pattern, allocator=allocator, **chosen
        )
        for sparsity, metrics in result.values.items():
            measured = metrics["value"]
            expected = ("", "")
            if (pattern, allocator) == ("unstructured", "global"):
                expected = compared(sparsity, measured)
            rows.append((pattern, allocator, f"{sparsity:g}", f"{measured:.4f}", *expected))
    for pattern in ("2:4", "1:4"):  # patterns with a sparsity of their own
        pruned = copy.deepcopy(model)
        sparsity = prunus.prune(pruned, "magnitude", pattern=pattern, **chosen).sparsity
        rows.append((pattern, "", f"{sparsity:g}", f"{accuracy(pruned):.4f}", "", ""))
    header = ("pattern", "allocator", "sparsity", "top-1", "expected", f"within {TOLERANCE}")
    print_table(header, rows)


if __name__ == "__main__":
    main()
