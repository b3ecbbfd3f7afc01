"""Folds: permutations of channels that the stored weights take and the function does not notice.

A reader's input channels are permuted so that less score is lost to N:M; the same permutation of
what writes those channels undoes it. Y. Zhang et al., "Plug-and-play: an efficient post-training
pruning method for large language models", ICLR 2024, https://openreview.net/forum?id=Tr0lPx9woF,
searches such permutations of linear layers; to store them in the weights before is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from prunus.core.layers import Layer


class FoldError(Exception):
    """Why a layer has no fold; raised by rules, kept as text in `FoldPlan.refused`."""


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


class Move(Protocol):
    """One thing that moves with a fold."""

    def permute(self, perms: Tensor) -> None:
        """``perms`` is (groups, width)."""

    def saved(self) -> Callable[[], None]:
        """What puts back the present state, as often as it is called."""


@dataclass(frozen=True, eq=False)
class Slot:
    """One parameter or buffer that takes part: where along ``dim`` its channels lie.

    ``name`` is its clean name, ``positions`` (groups, copies, width) as in `Fold`.
    """

    name: str
    module: nn.Module
    attribute: str
    dim: int
    positions: Tensor

    @property
    def tensor(self) -> Tensor:
        # looked up anew: moving a module to a device keeps its parameters, but replaces its buffers
        tensor: Tensor = getattr(self.module, self.attribute)
        return tensor

    @torch.no_grad()
    def permute(self, perms: Tensor) -> None:
        """In place, so that strides, ties and requires_grad stay."""
        tensor = self.tensor
        index = moved(tensor.shape[self.dim], self.positions, perms).to(tensor.device)
        tensor.copy_(tensor.index_select(self.dim, index))

    def saved(self) -> Callable[[], None]:
        old = self.tensor.detach().clone()

        def put_back() -> None:
            self.tensor.detach().copy_(old)

        return put_back


@dataclass(frozen=True, eq=False)
class Fold:
    """Readers whose input channels move by one permutation, and all that moves along.

    ``positions`` (groups, copies, width) are the readers' input channels: each group is permuted
    within itself, in the same way in each of its copies. ``slots`` are all tensors that are
    permuted, the readers' weights among them. ``scope`` is the smallest module that holds all of
    it, so the one whose function must not change. ``names`` are the clean names of the slots and
    of what is tied to them.
    """

    name: str
    kind: str
    readers: tuple[Layer, ...]
    positions: Tensor
    slots: tuple[Slot, ...]
    scope: nn.Module
    names: tuple[str, ...]

    def moves(self) -> Sequence[Move]:
        """All that `apply` permutes, in its order."""
        return self.slots

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
        """Permute every slot in place, or on an interrupt none; ``perms`` is (groups, width).

        Gradients and optimizer states are left as they are: do this before training starts.
        Raises ValueError if ``perms`` holds no permutations of this shape.
        """
        taken = AppliedFold(self, self.checked(perms))
        try:
            taken.apply()
        except BaseException:
            taken.undo()
            raise

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


@dataclass
class AppliedFold:
    """A fold on its way into the weights, which can be taken back whatever has interrupted it."""

    fold: Fold
    perms: Tensor
    """(groups, width) as `Fold.checked` gives them"""
    _at: tuple[int, Callable[[], None] | None] = field(default=(0, None), repr=False)
    # so many moves are made once the function, if there is one, has put back the one under way;
    # one tuple, because an interrupt may come between any two statements

    def apply(self) -> None:
        """Make the moves that are not made yet."""
        moves, begin = self.fold.moves(), self._steady()
        for i in range(begin, len(moves)):
            self._at = i, moves[i].saved()
            moves[i].permute(self.perms)
        self._at = len(moves), None

    def undo(self) -> None:
        """Bit for bit what was there before; nothing happens where nothing was applied."""
        moves, back = self.fold.moves(), inverse(self.perms)
        for i in reversed(range(self._steady())):
            self._at = i + 1, moves[i].saved()
            moves[i].permute(back)
            self._at = i, None

    def _steady(self) -> int:
        """How many moves are made, none of them by halves."""
        count, put_back = self._at
        if put_back is not None:
            put_back()
            self._at = count, None
        return count


@dataclass(frozen=True)
class FoldPlan:
    """The folds of a model, and for each layer that has none the reason, by the layer's name."""

    folds: tuple[Fold, ...]
    refused: dict[str, str]
