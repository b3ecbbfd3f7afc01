"""Two networks over sparse voxels, trained on synthetic scenes in about a minute each.

A small MinkUNet (Choy et al., "4D Spatio-Temporal ConvNets", CVPR 2019) names every voxel of scenes
with a floor, a wall, balls and boxes. A small SECOND (Yan et al., Sensors 2018) finds the balls and
boxes in a bird's-eye view: sparse in 3-D, then dense in 2-D. Both are pruned while they train.

    python -m research.sparse_scenes [--steps 60] [--network unet|second]
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import prunus
from prunus import spatial as spconv

SIZE = 32
CLASSES = ("floor", "wall", "ball", "box")
Scene = tuple[spconv.SparseTensor, Tensor, Tensor]


def scenes(count: int, seed: int) -> Scene:
    """A batch: voxels with their place as features, the class of each, and the objects from above.

    Those are (count, 8, 8): 0 nothing, 1 the centre of a ball, 2 that of a box.
    """
    generator = torch.Generator().manual_seed(seed)
    grid = torch.zeros(count, SIZE, SIZE, SIZE, dtype=torch.int8)
    axes = torch.meshgrid(*[torch.arange(SIZE)] * 3, indexing="ij")
    place = torch.stack(axes, -1).float()
    objects = torch.zeros(count, SIZE // 4, SIZE // 4, dtype=torch.long)
    for scene, above in zip(grid, objects, strict=True):
        scene[..., 0], scene[0] = 1, 2
        for _ in range(4):
            centre = 5 + 22 * torch.rand(3, generator=generator)
            radius = 2 + 2 * torch.rand(1, generator=generator)
            ball = bool(torch.rand(1, generator=generator) < 0.5)
            from_centre = (place - centre).abs()
            distance = from_centre.norm(dim=-1) if ball else from_centre.amax(-1)
            scene[(distance - radius).abs() < 0.5] = 3 if ball else 4
            cell = (centre / 4).long()
            above[cell[0], cell[1]] = 1 if ball else 2
    indices = grid.nonzero()
    kinds = grid[tuple(indices.T)].long() - 1
    features = torch.cat([indices[:, 1:].float() / SIZE, torch.ones(len(indices), 1)], 1)
    return spconv.SparseTensor(features, indices, (SIZE,) * 3, count), kinds, objects


def block(channels_in: int, channels: int) -> spconv.SparseSequential:
    return spconv.SparseSequential(
        spconv.SubMConv3d(channels_in, channels, 3, bias=False),
        nn.BatchNorm1d(channels),
        nn.ReLU(),
    )


def down(channels_in: int, channels: int, key: str) -> spconv.SparseSequential:
    return spconv.SparseSequential(
        spconv.SparseConv3d(channels_in, channels, 2, 2, bias=False, indice_key=key),
        nn.BatchNorm1d(channels),
        nn.ReLU(),
    )


class UNet(nn.Module):
    """Two levels down by stride 2, and up again to the same sites by the inverse convolutions."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = block(4, width)
        self.down1, self.level1 = down(width, 2 * width, "1"), block(2 * width, 2 * width)
        self.down2, self.level2 = down(2 * width, 4 * width, "2"), block(4 * width, 4 * width)
        self.up2 = spconv.SparseInverseConv3d(4 * width, 2 * width, 2, "2", bias=False)
        self.out2 = block(4 * width, 2 * width)
        self.up1 = spconv.SparseInverseConv3d(2 * width, width, 2, "1", bias=False)
        self.out1 = block(2 * width, width)
        self.head = nn.Linear(width, len(CLASSES))

    def forward(self, x: spconv.SparseTensor) -> Tensor:
        full = self.stem(x)
        half = self.level1(self.down1(full))
        quarter = self.level2(self.down2(half))
        up = self.out2(_join(self.up2(quarter), half))
        up = self.out1(_join(self.up1(up), full))
        return self.head(up.features)


def _join(a: spconv.SparseTensor, b: spconv.SparseTensor) -> spconv.SparseTensor:
    return a.replace_feature(torch.cat([a.features, b.features], 1))


class Second(nn.Module):
    """Sparse in 3-D down to an eighth, then height becomes channels and 2-D convolutions go on."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.sparse = spconv.SparseSequential(
            block(4, width), down(width, 2 * width, "1"), block(2 * width, 2 * width),
            down(2 * width, 2 * width, "2"), block(2 * width, 2 * width), spconv.ToDense(),
        )  # fmt: skip
        self.dense = nn.Sequential(
            nn.Conv2d(2 * width * SIZE // 4, 4 * width, 3, padding=1), nn.BatchNorm2d(4 * width),
            nn.ReLU(), nn.Conv2d(4 * width, 4 * width, 3, padding=1), nn.BatchNorm2d(4 * width),
            nn.ReLU(), nn.Conv2d(4 * width, 3, 1),
        )  # fmt: skip

    def forward(self, x: spconv.SparseTensor) -> Tensor:
        volume = self.sparse(x)  # (batch, channels, x, y, height)
        return self.dense(volume.movedim(-1, 2).flatten(1, 2))


def loss_and_accuracy(model: nn.Module, scene: Scene) -> tuple[Tensor, float]:
    """Accuracy is of all voxels, and of the cells that hold an object or are thought to."""
    x, kinds, objects = scene
    output = model(x)
    answer = output.argmax(1)
    if isinstance(model, UNet):
        return F.cross_entropy(output, kinds), float((answer == kinds).float().mean())
    loss = F.cross_entropy(output, objects, torch.tensor([0.2, 1.0, 1.0]))
    asked = (objects > 0) | (answer > 0)
    return loss, float((answer == objects)[asked].float().mean())


def train(model: nn.Module, steps: int) -> None:
    layers = "['SparseConvolution']"
    recipe = f"""modifiers:
  - prune:
      pruner: magnitude
      layers: {layers}
      sparsity: {{from: 0.2, to: 0.8, curve: cubic}}
      window: {{from: {steps // 4}step, to: {3 * steps // 4}step, every: {max(1, steps // 10)}step}}
"""
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    begin = time.perf_counter()
    with prunus.attach(model, optimizer, recipe, steps_per_epoch=steps, epochs=1):
        for step in range(steps):
            loss, accuracy = loss_and_accuracy(model.train(), scenes(4, step))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            if step % max(1, steps // 6) == 0:
                print(f"step {step}: loss {loss.item():.3f}, accuracy {accuracy:.3f}")
    seconds = time.perf_counter() - begin
    model.eval()
    with torch.no_grad():
        tests = [loss_and_accuracy(model, scenes(4, 10_000 + i))[1] for i in range(5)]
    sparsity = prunus.sparsity(model)
    print(f"{type(model).__name__}: accuracy {sum(tests) / len(tests):.3f} on 20 new scenes, "
          f"{seconds:.0f} s\n{sparsity}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--network", choices=("unet", "second"))
    args = parser.parse_args()
    for name, network in (("unet", UNet), ("second", Second)):
        if args.network in (None, name):
            torch.manual_seed(0)
            train(network(), args.steps)


if __name__ == "__main__":
    main()
