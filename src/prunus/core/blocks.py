"""The blocks of a model that run one after the other, as a transformer's layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from torch import nn

from prunus.core.layers import Layer, all_layers, clean_name, unwrap
from prunus.core.names import did_you_mean


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


def _lists(model: nn.Module) -> dict[str, Blocks]:
    """Lists and sequences of two or more modules of one class, by name."""
    found = {}
    for name, module in unwrap(model).named_modules():
        children = list(module.children())
        if not isinstance(module, nn.ModuleList | nn.Sequential) or len(children) < 2:
            continue
        if len({type(child) for child in children}) == 1 and list(children[0].children()):
            found[clean_name(name)] = Blocks(clean_name(name), dict(module.named_children()))
    return found


def find_blocks(model: nn.Module, name: str | None = None) -> Blocks | None:
    """The list of blocks of this name; without one, the list that holds most of the weights.

    Of lists inside each other the outermost counts. Returns None where there is no such list;
    raises ValueError for a name that is no list of modules.
    """
    lists = _lists(model)
    if name is not None:
        modules = dict(unwrap(model).named_modules())
        if isinstance(modules.get(name), nn.ModuleList | nn.Sequential):
            return Blocks(name, dict(modules[name].named_children()))
        hint = did_you_mean(name, lists) or (f"; lists are: {', '.join(lists)}" if lists else "")
        raise ValueError(f"sequential: the model has no list of blocks {name!r}{hint}")
    sizes = {
        key: sum(prod(layer.shape) for module in blocks.modules for layer in all_layers(module))
        for key, blocks in lists.items()
    }
    if not any(sizes.values()):
        return None
    return lists[max(sizes, key=lambda key: (sizes[key], -len(key)))]


def by_block(blocks: Blocks | None, layers: Sequence[Layer]) -> list[list[Layer]]:
    """The layers, together with those of the same block; each alone that is in none."""
    groups: dict[object, list[Layer]] = {}
    for layer in layers:
        number = None if blocks is None else blocks.number_of(layer.name)
        groups.setdefault(layer if number is None else number, []).append(layer)
    return list(groups.values())
