"""How many units of each group go, so that what is left costs what was asked for."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prunus.allocators import ALLOCATORS, Allocator, Problem, Table, Unit
from prunus.channels.groups import Group

Cost = Callable[[Mapping[str, Sequence[int]]], float]
STEPS = 40


@dataclass(frozen=True)
class Choice:
    """Groups that may lose units, what each unit is worth, and how their numbers are rounded."""

    groups: Sequence[Group]
    scores: Mapping[str, Tensor]
    """(units,) for each group; the lowest go first"""
    round_to: int = 1
    uniform: bool = False

    def problem(self, target: float | None) -> Problem:
        units = [
            Unit(group.name, (group.size, len(group.slots), group.width), group.size, 0)
            for group in self.groups
        ]
        return Problem(units, target, self._lowest)

    def _lowest(self, k: int) -> list[int]:
        """How many of the k lowest scores lie in each group, sparing each one's best unit."""
        ranked, owners = [], []
        for i, group in enumerate(self.groups):
            scores = self.scores[group.name].sort().values
            ranked.append(scores[: group.size - group.min_keep])
            owners.append(torch.full((len(ranked[-1]),), i))
        order = torch.cat(ranked).argsort(stable=True)[:k]
        return torch.bincount(torch.cat(owners)[order], minlength=len(self.groups)).tolist()

    def rounded(self, drop: Sequence[int]) -> list[int]:
        """Units to go after rounding what is kept; of one kind of block alike, if ``uniform``."""
        kept = [g.size - d for g, d in zip(self.groups, drop, strict=True)]
        if self.uniform:
            kept = self._alike(kept)
        return [g.size - self._round(g, k) for g, k in zip(self.groups, kept, strict=True)]

    def _alike(self, kept: Sequence[int]) -> list[int]:
        families: dict[tuple[str, int], list[int]] = {}
        for i, group in enumerate(self.groups):
            families.setdefault((family(group.name), group.size), []).append(i)
        results = list(kept)
        for members in families.values():
            mean = round(sum(kept[i] for i in members) / len(members))
            for i in members:
                results[i] = mean
        return results

    def _round(self, group: Group, kept: int) -> int:
        if kept >= group.size:
            return group.size
        multiple = group.multiple(self.round_to)
        rounded = max(round(kept / multiple) * multiple, multiple, group.min_keep)
        return min(rounded, group.size)

    def units(self, drop: Sequence[int]) -> dict[str, list[int]]:
        """Group -> numbers of the units of the lowest scores."""
        return {
            group.name: self.scores[group.name].argsort(stable=True)[:count].tolist()
            for group, count in zip(self.groups, drop, strict=True)
            if count
        }


def family(name: str) -> str:
    """The name without the numbers of blocks: ``layers.*.mlp.up``."""
    return re.sub(r"\b\d+\b", "*", name)


def allocator_of(allocator: str | Allocator | Mapping[str, float]) -> Allocator:
    if isinstance(allocator, str):
        return ALLOCATORS[allocator]()
    if isinstance(allocator, Mapping):
        return Table({**allocator, "*": allocator.get("*", 0.0)})  # what is not named stays whole
    return allocator


def allocate(
    choice: Choice,
    allocator: str | Allocator | Mapping[str, float],
    cost: Cost | None,
    limit: float,
) -> dict[str, list[int]]:
    """Group -> units to go, so that their ``cost`` is at most ``limit``, by as little as can be.

    The allocator is asked for more and more sparsity until the cost is met, by bisection; then
    groups get back what the last step took too much. Without a cost it is asked once, with no
    target: a table says it all.

    Raises ValueError if even the smallest model costs more.
    """
    chosen = allocator_of(allocator)
    if cost is None:
        return choice.units(choice.rounded(list(chosen.allocate(choice.problem(None)).drop)))

    def drop(sparsity: float) -> list[int]:
        return choice.rounded(list(chosen.allocate(choice.problem(sparsity)).drop))

    most = max(0.0, 1 - len(choice.groups) / sum(g.size for g in choice.groups))
    low, high = 0.0, 1.0 if chosen.name != "global" else most
    if (least := cost(choice.units(drop(high)))) > limit:
        raise ValueError(
            f"target: the smallest model costs {least:,.0f} and {limit:,.0f} was asked for; allow "
            "more layers, or raise the target"
        )
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(choice.units(drop(middle))) <= limit else (middle, high)
        if drop(low) == drop(high):
            break
    return _given_back(choice, cost, limit, drop(low), drop(high))


def _given_back(
    choice: Choice, cost: Cost, limit: float, less: Sequence[int], more: Sequence[int]
) -> dict[str, list[int]]:
    """``more`` units go, but in the groups where ``less`` are enough, one group after another."""
    drop = list(more)
    if not choice.uniform:
        for i, count in enumerate(less):
            if count < drop[i]:
                tried = [*drop[:i], count, *drop[i + 1 :]]
                drop = tried if cost(choice.units(tried)) <= limit else drop
    return choice.units(drop)
