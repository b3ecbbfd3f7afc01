"""The picture of an estimate in `docs/hardware.md`: a ResNet-18 as timm initializes it.

Pruned by magnitude to 90 %, all layers ranked together. It is not trained, so the shares of zeros
in its activations are those of random weights.

    python -m research.benchmarks.estimate_picture [--output docs/hardware/estimate.png]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch

import prunus

from research.benchmarks.measure import add_options, hardware


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_options(parser)
    parser.add_argument("--output", type=Path, default=Path("docs/hardware/estimate.png"))
    args = parser.parse_args()
    print(hardware(args), "\n")
    torch.manual_seed(0)
    model = timm.create_model("resnet18")
    prunus.prune(model, "magnitude", sparsity=0.9)
    result = prunus.estimate(model, torch.randn(1, 3, 224, 224))
    print(result)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    result.plot(args.output)


if __name__ == "__main__":
    main()
