"""The blocks of a model that run one after the other, as a transformer's layers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from torch import nn

from prunus.core.layers import Layer, all_layers
from prunus.core.names import did_you_mean
from prunus.core.wrappers import clean_name, unwrap


@dataclass(frozen=True)
class Blocks:
    """A list of modules inside a model, as ``model.layers``."""

    name: str
    children: Mapping[str, nn.Module]
    """by their names in the list, which are mostly numbers"""

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return tuple(self.children.values())

    def __len__(self) -> int:
        return len(self.children)

    def name_of(self, number: int) -> str:
        key = list(self.children)[number]
        return f"{self.name}.{key}" if self.name else key

    def number_of(self, name: str) -> int | None:
        """The number of the block in which a layer or parameter of this name is."""
        prefix = f"{self.name}." if self.name else ""
        head = name.removeprefix(prefix).split(".")[0]
        inside = name.startswith(prefix) and head in self.children
        return list(self.children).index(head) if inside else None


@dataclass(frozen=True)
class BlockLists:
    """Lists of blocks that lie beside each other, their blocks numbered through."""

    lists: tuple[Blocks, ...]

    @property
    def name(self) -> str:
        return ", ".join(blocks.name for blocks in self.lists)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return tuple(module for blocks in self.lists for module in blocks.modules)

    def __len__(self) -> int:
        return sum(map(len, self.lists))

    def numbers(self, blocks: Blocks) -> range:
        """The numbers of one list's blocks."""
        start = sum(map(len, self.lists[: self.lists.index(blocks)]))
        return range(start, start + len(blocks))

    def name_of(self, number: int) -> str:
        return [b.name_of(i) for b in self.lists for i in range(len(b))][number]

    def number_of(self, name: str) -> int | None:
        """The number of the block in which a layer or parameter of this name is."""
        for blocks in self.lists:
            if (number := blocks.number_of(name)) is not None:
                return self.numbers(blocks)[number]
        return None

    def owner(self, layer: Layer) -> int | None:
        """The number of the one block that a layer is in; None if it is in none, or in several."""
        return None if layer.module in self._shared else self.number_of(layer.name)

    @cached_property
    def _shared(self) -> set[nn.Module]:
        """Modules that are in several blocks."""
        counts = Counter(m for module in self.modules for m in set(module.modules()))
        return {m for m, count in counts.items() if count > 1}


def _of_one_kind(children: Sequence[nn.Module]) -> bool:
    """Whether modules can stand for each other: a hybrid stack has blocks of several classes.

    Some of its classes come again, or all are called alike, as `MambaLayer` and `AttentionLayer`.
    """
    classes = {type(child).__name__ for child in children}
    last_words = {re.split("(?=[A-Z])", name)[-1] for name in classes}
    return len(classes) < len(children) or len(last_words) == 1


def _lists(model: nn.Module) -> dict[str, Blocks]:
    """Lists and sequences of blocks by name."""
    found = {}
    for name, module in unwrap(model).named_modules():
        children = list(module.children())
        if not isinstance(module, nn.ModuleList | nn.Sequential) or not children:
            continue
        if any(isinstance(child, nn.ModuleList | nn.ModuleDict) for child in children):
            continue  # which nobody calls
        whole = [any(child.children()) for child in children]
        one_class = len({type(child) for child in children}) == 1
        if (one_class and any(whole)) or (all(whole) and _of_one_kind(children)):
            found[clean_name(name)] = Blocks(clean_name(name), dict(module.named_children()))
    return found


def find_blocks(model: nn.Module, name: str | None = None) -> Blocks | None:
    """The list of blocks of this name; without one, the list that holds most of the weights.

    Of lists inside each other the outermost counts. Returns None where there is no such list;
    raises ValueError for a name that is no list of modules.
    """
    if name is not None:
        modules = dict(unwrap(model).named_modules())
        if isinstance(modules.get(name), nn.ModuleList | nn.Sequential):
            return Blocks(name, dict(modules[name].named_children()))
        lists = _lists(model)
        hint = did_you_mean(name, lists) or (f"; lists are: {', '.join(lists)}" if lists else "")
        raise ValueError(f"sequential: the model has no list of blocks {name!r}{hint}")
    lists = _outermost({key: blocks for key, blocks in _lists(model).items() if len(blocks) > 1})
    sizes = {name: _size(blocks) for name, blocks in lists.items()}
    return lists[max(sizes, key=lambda key: (sizes[key], -len(key)))] if sizes else None


def _size(blocks: Blocks) -> int:
    return sum(prod(x.shape) for module in blocks.modules for x in all_layers(module))


def _outermost(lists: Mapping[str, Blocks]) -> dict[str, Blocks]:
    """Those with weights that are in no other one."""
    found: dict[str, Blocks] = {}
    for name, blocks in lists.items():  # outer ones come first
        inside = any(other.number_of(name) is not None for other in found.values())
        if not inside and _size(blocks):
            found[name] = blocks
    return found


def find_block_lists(model: nn.Module, name: str | None = None) -> BlockLists | None:
    """The list of this name alone; without one, all outermost lists: an encoder's and a decoder's.

    A list of a single block counts where there is no other. Returns None where there is none at
    all; raises ValueError as `find_blocks`.
    """
    if name is not None:
        named = find_blocks(model, name)
        return None if named is None else BlockLists((named,))
    every = _lists(model)
    lists = _outermost({key: blocks for key, blocks in every.items() if len(blocks) > 1})
    if not lists:
        modules = {clean_name(key): m for key, m in unwrap(model).named_modules()}
        single = {k: b for k, b in every.items() if isinstance(modules[k], nn.ModuleList)}
        lists = _outermost(single)
    return BlockLists(tuple(lists.values())) if lists else None


def by_block(blocks: BlockLists | None, layers: Sequence[Layer]) -> list[list[Layer]]:
    """The layers, together with those of the same block; each alone that is in none."""
    groups: dict[object, list[Layer]] = {}
    for layer in layers:
        number = None if blocks is None else blocks.number_of(layer.name)
        groups.setdefault(layer if number is None else number, []).append(layer)
    return list(groups.values())
