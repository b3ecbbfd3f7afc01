"""Folds: permutations of channels that the stored weights take and the function does not notice.

A reader's input channels are permuted so that less score is lost to N:M; the same permutation of
what writes those channels undoes it. Y. Zhang et al., "Plug-and-play: an efficient post-training
pruning method for large language models", ICLR 2024, https://openreview.net/forum?id=Tr0lPx9woF,
searches such permutations of linear layers; to store them in the weights before is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunus.layers import Layer


class FoldError(Exception):
    """Why a layer has no fold; raised by rules, kept as text in `Plan.refused`."""


def moved(size: int, positions: Tensor, perms: Tensor) -> Tensor:
    """The (size,) index of what each position holds afterwards; what is not in `positions` stays.

    Position ``positions[g, c, j]`` takes what ``positions[g, c, perms[g, j]]`` held: ``positions``
    is (groups, copies, width) and ``perms`` (groups, width).
    """
    index = torch.arange(size)
    sources = positions.gather(2, perms.unsqueeze(1).expand_as(positions))
    return index.index_put((positions,), sources)


def inverse(perms: Tensor) -> Tensor:
    """(groups, width) the permutations that undo these."""
    return perms.argsort(dim=1)


@dataclass(frozen=True, eq=False)
class Slot:
    """One parameter or buffer that takes part: where along ``dim`` its channels lie.

    ``name`` is its clean name, ``positions`` (groups, copies, width) as in `Fold`.
    """

    name: str
    tensor: Tensor
    dim: int
    positions: Tensor

    def permute(self, perms: Tensor) -> None:
        """In place, so that strides, ties and requires_grad stay."""
        index = moved(self.tensor.shape[self.dim], self.positions, perms).to(self.tensor.device)
        with torch.no_grad():
            self.tensor.copy_(self.tensor.index_select(self.dim, index))


@dataclass(frozen=True, eq=False)
class Fold:
    """Readers whose input channels move by one permutation, and all that moves along.

    ``positions`` (groups, copies, width) are the readers' input channels: each group is permuted
    within itself, in the same way in each of its copies. ``slots`` are all tensors that are
    permuted, the readers' weights among them. ``scope`` is the smallest module that holds all of
    it, so the one whose function must not change.
    """

    name: str
    kind: str
    readers: tuple[Layer, ...]
    positions: Tensor
    slots: tuple[Slot, ...]
    scope: nn.Module

    def checked(self, perms: Tensor) -> Tensor:
        """The permutations on the CPU. Raises ValueError if they are none of this fold's shape."""
        groups, _, width = self.positions.shape
        if tuple(perms.shape) != (groups, width):
            raise ValueError(
                f"perms={tuple(perms.shape)} does not fit {self.name}; use ({groups}, {width})"
            )
        perms = perms.detach().cpu().long()
        if not torch.equal(perms.sort(dim=1).values, torch.arange(width).expand(groups, -1)):
            raise ValueError(
                f"perms={perms.tolist()!r:.80} repeats or lacks channels of {self.name}; each row "
                f"must hold 0..{width - 1} once"
            )
        return perms

    def apply(self, perms: Tensor) -> None:
        """Permute every slot in place; ``perms`` is (groups, width).

        Gradients and optimizer states are left as they are: do this before training starts.
        Raises ValueError if ``perms`` holds no permutations of this shape.
        """
        perms = self.checked(perms)
        for slot in self.slots:
            slot.permute(perms)

    def undo(self, perms: Tensor) -> None:
        """Bit for bit what was there before `apply`."""
        self.apply(inverse(self.checked(perms)))

    def columns(self, perms: Tensor) -> Tensor:
        """(channels,) the permutation of the readers' input channels: new weight = ``w[:, it]``."""
        return moved(self.readers[0].channels(), self.positions, self.checked(perms))

    def gather_scores(self, scores: Sequence[Tensor]) -> list[Tensor]:
        """For each group the (rows, width) matrix to search a permutation of its columns in.

        ``scores`` holds one (rows, columns) matrix for each reader, in the view of
        `Layer.with_channels_inner`. Readers, kernel positions and copies all become rows.
        """
        by_channel = [
            score.reshape(-1, reader.channels())
            for score, reader in zip(scores, self.readers, strict=True)
        ]
        return [
            torch.cat([score[:, at.to(score.device)] for score in by_channel for at in copies])
            for copies in self.positions
        ]


@dataclass(frozen=True)
class Plan:
    """The folds of a model, and for each layer that has none the reason, by the layer's name."""

    folds: tuple[Fold, ...]
    refused: dict[str, str]
