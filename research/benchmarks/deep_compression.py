"""Deep compression end to end: prune while training, share 4-bit weights, Huffman code them.

Han et al., "Deep Compression", ICLR 2016, https://arxiv.org/abs/1510.00149. On the demo's vision
transformer and scikit-learn's digits, and with --resnet on the CIFAR ResNet-20 of
`resnet20_cifar10.py` (whose data a user has to bring). Accuracy is measured after each stage, on
the model that a decoder would get back; sizes are exact and include every other parameter in full.

    python -m research.benchmarks.deep_compression [--epochs 30] [--resnet --steps 300]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import prunus
from prunus import formats
from prunus import hardware as models

from research import demo
from research.benchmarks.measure import add_options, hardware, print_table
from research.benchmarks.resnet20_cifar10 import SHARED, ResNet20, read_images, top1

INDEX_BITS, CODE_BITS = 5, 4
Accuracy = Callable[[nn.Module], float]
PUBLISHED = """published factors: LeNet-300-100 40x, LeNet-5 39x, AlexNet 35x (9x pruning, 27x with
sharing), VGG-16 49x (13x, 31x), with no loss of accuracy"""


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[tuple[Tensor, Tensor]],
    steps: int,
) -> None:
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x, y = next(batches)
        demo.step(model.train(), optimizer, x, y)
        schedule.step()


def endless(x: Tensor, y: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        for picked in torch.randperm(len(x)).split(size):
            yield x[picked], y[picked]


def decoded(model: nn.Module, names: list[str]) -> nn.Module:
    """The model with its weights encoded and decoded: what is stored is what is measured."""
    copied = copy.deepcopy(model)
    for name in names:
        weight = copied.get_submodule(name).weight.data
        stored = formats.encode(weight, "eie", elements=1, index_bits=INDEX_BITS, reset="stream")
        codes, zeros = stored.entries()
        for stream, alphabet in ((codes, 16), (zeros, 1 << INDEX_BITS)):
            assert (formats.Huffman.encode(stream, alphabet).decode() == stream).all()
        weight.copy_(stored.decode())
    return copied


def report(model: nn.Module, names: list[str], accuracies: list[str]) -> None:
    weights = [model.get_submodule(name).weight for name in names]
    sizes = [models.compressed_size(w, CODE_BITS, INDEX_BITS) for w in weights]
    everything = sum(32 * t.numel() for t in model.state_dict().values() if t.is_floating_point())
    rest = everything - sum(size.dense for size in sizes)
    rows = []
    for stage, accuracy in zip(("dense", "pruned", "shared", "huffman"), accuracies, strict=True):
        bits = sum(getattr(size, stage) for size in sizes)
        layers = sum(size.dense for size in sizes) / bits
        share, whole = f"{layers:.1f}x", f"{everything / (bits + rest):.1f}x"
        rows.append((stage, f"{(bits + rest) / 8192:.1f}", share, whole, accuracy))
    print_table(("stage", "KiB in all", "pruned layers", "whole model", "accuracy"), rows)
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    print(f"sparsity of the pruned layers {zeros:.3f}, other parameters {rest / 8192:.1f} KiB\n")


def compress(
    model: nn.Module,
    chosen: dict[str, list[str]],
    optimizer: torch.optim.Optimizer,
    batches: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    accuracy: Accuracy,
) -> tuple[float, float, list[str]]:
    """Share the pruned layers; the accuracy before and after fine-tuning the shared values."""
    sharing = models.share_weights(model, CODE_BITS, optimizer=optimizer, **chosen)
    names = list(sharing)
    at_once = accuracy(model)
    with sharing:
        train(model, optimizer, batches, steps)
    return at_once, accuracy(decoded(model, names)), names


def digits(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    data, test = demo.digits()
    model = demo.build()
    demo.train_dense(model, data, args.epochs)
    dense = demo.accuracy(model, test)
    demo.train_gradual(model, data, test, args.epochs)
    pruned = demo.accuracy(model, test)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    steps = 22 * args.epochs // 2
    at_once, tuned, names = compress(
        model, {}, optimizer, endless(*data, 64), steps, lambda m: demo.accuracy(m, test)
    )
    print(f"\nvision transformer on digits, {len(test[0])} test images\n")
    shared = f"{tuned:.4f} ({at_once:.4f} before fine-tuning)"
    report(model, names, [f"{dense:.4f}", f"{pruned:.4f}", shared, f"{tuned:.4f}"])
    print(models.estimate(model, test[0][:8]), "\n")


def resnet(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    model = ResNet20()
    model.load_state_dict(load_file(SHARED / "models" / "resnet20-cifar10-jpeg.safetensors"))
    archive = SHARED / "data" / "cifar10-jpeg.tar.gz"
    images, labels = read_images(archive, "train")
    test = read_images(archive, "val")
    dense = top1(model, *test)
    batches = endless(images, labels, 128)
    chosen = {"layers": ["Conv2d"], "exclude": ["conv1"]}
    recipe = f"""modifiers:
  - prune:
      pruner: magnitude
      layers: [Conv2d]
      exclude: [conv1]
      allocator: global
      sparsity: {{from: 0.3, to: 0.8, curve: cubic}}
      window: {{from: 0step, to: {args.steps // 2}step, every: {max(1, args.steps // 20)}step}}
"""
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    with prunus.attach(model, optimizer, recipe, steps_per_epoch=args.steps, epochs=1):
        train(model, optimizer, batches, args.steps)
    pruned = top1(model, *test)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    at_once, tuned, names = compress(
        model, chosen, optimizer, batches, args.steps // 3, lambda m: top1(m, *test)
    )
    print(f"ResNet-20 on CIFAR-10, {len(test[0])} test images, {args.steps} steps of 128 images\n")
    shared = f"{tuned:.4f} ({at_once:.4f} before fine-tuning)"
    report(model, names, [f"{dense:.4f}", f"{pruned:.4f}", shared, f"{tuned:.4f}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_options(parser)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--resnet", action="store_true", help="ResNet-20 too")
    parser.add_argument("--steps", type=int, default=300, help="of pruning ResNet-20")
    args = parser.parse_args()
    print(hardware(args))
    digits(args)
    if args.resnet:
        resnet(args)
    print(PUBLISHED)


if __name__ == "__main__":
    main()
