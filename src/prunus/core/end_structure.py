"""What reads a model's input and what writes its output, as far as its structure says."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from prunus.core.layers import CONVS, Layer
from prunus.core.wrappers import unwrap

PATCHES = re.compile(r"(^|\.)patch_(embed|proj)\w*(\.|$)")
PIXELS = (1, 3)
"""channels of recordings, grey images and coloured ones"""
HEADS = re.compile(r"(?!pre_)\w*(classifier|lm_head|(class|bbox)_(embed|predictor))")
"""what heads inside larger parts are called; a layer of its own may be called ``head`` as well"""


def _outputs(layer: Layer) -> int:
    return layer.matrix_shape()[0]


def _inputs(layer: Layer) -> int:
    module: Any = layer.module
    return layer.channels() * (module.groups if isinstance(module, CONVS) else 1)


def reading(model: nn.Module, layers: Sequence[Layer]) -> list[Layer]:
    """Convolutions that begin the network or read pixels, and linear embeddings of patches.

    The first layer begins it if it is a convolution, unless an embedding comes before. Pixels are
    one or three channels that no convolution has made.
    """
    first = layers[0]
    embedding = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    order = {id(module): i for i, module in enumerate(model.modules())}
    after = embedding is not None and order[id(embedding)] < order.get(id(first.module), 0)
    deep = isinstance(first.module, CONVS) and first.module.groups > max(PIXELS)
    found = [first] if isinstance(first.module, CONVS) and not after and not deep else []
    made: set[int] = set()
    for layer in layers:
        if isinstance(layer.module, CONVS):
            width = _inputs(layer)
            pixels = width in PIXELS and width not in made and _outputs(layer) > width
            found += [layer] if pixels and layer not in found else []
            made.add(_outputs(layer))
        elif isinstance(layer.module, nn.Linear) and PATCHES.search(layer.name):
            found.append(layer)
    return found


def writing(model: nn.Module, layers: Sequence[Layer]) -> list[Layer]:
    """What the model itself calls its head, and what comes after its blocks, or last.

    timm's ``get_classifier`` says all of it. Else it is ``get_output_embeddings`` (transformers),
    the last layer of each part that follows the base model or the lists of blocks, and of what is
    called a head; of a model without these, the last layer and those parallel to it.
    """
    inner = unwrap(model)
    found = own_heads(inner, layers)
    if found is not None:
        return found
    found = _last(_Part(inner, layers)) + _called_head(inner, layers)
    found += output_embeddings(inner, layers)
    return [layer for layer in layers if layer in found]


def output_embeddings(model: nn.Module, layers: Sequence[Layer]) -> list[Layer]:
    """What transformers' models call so, as a language model's head."""
    if not callable(getattr(model, "get_output_embeddings", None)):
        return []
    named: Any = model.get_output_embeddings()  # type: ignore[operator]
    return [layer for layer in layers if layer.module is named]


def own_heads(model: nn.Module, layers: Sequence[Layer]) -> list[Layer] | None:
    """The last layers of what timm's models call their classifier; None for other models.

    A backbone says that it has none (an Identity); a distilled model names two.
    """
    if not callable(getattr(model, "get_classifier", None)):
        return None
    named: Any = model.get_classifier()  # type: ignore[operator]
    heads = list(named) if isinstance(named, tuple | list) else [named]
    parts = [_Part(head, layers) for head in heads if isinstance(head, nn.Module)]
    return [layer for part in parts if part.layers for layer in part.last]


class _Part:
    """A module and its layers."""

    def __init__(self, module: nn.Module, layers: Sequence[Layer]) -> None:
        inside = set(module.modules())
        self.module, self.layers = module, [x for x in layers if x.module in inside]

    def children(self) -> list[_Part]:
        parts = [_Part(child, self.layers) for child in self.module.children()]
        return [part for part in parts if part.layers]

    @property
    def has_blocks(self) -> bool:
        """Whether there is a list of modules that consist of others."""
        return any(map(_is_blocks, self.module.modules()))

    @property
    def last(self) -> list[Layer]:
        """The last layer; of parallel parts, and of a list that is no chain, that of each."""
        parts, module = self.children(), self.module
        if isinstance(module, nn.ModuleList):
            chain = any(a.feeds(b) for a, b in itertools.pairwise(parts))
            return self.layers[-1:] if chain else [x for part in parts for x in part.last]
        parallel = _parallel(module, parts) or parts[-1:]
        stages = any(_is_blocks(part.module) for part in parallel)
        found = [] if stages else [x for part in parallel for x in part.last]
        return found or self.layers[-1:]

    def feeds(self, other: _Part) -> bool:
        """Whether what it puts out is as wide as what the other one reads."""
        first, last = other.layers[0], other.layers[-1]
        # towers that end in the same width look like a chain if the last one keeps its width
        towers = first is last and _outputs(last) == _inputs(first)
        return _outputs(self.layers[-1]) == _inputs(first) and not towers


def _is_blocks(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) and any(list(item.children()) for item in module)


def _last(part: _Part) -> list[Layer]:
    """The last layers of a network."""
    parts, module, own = part.children(), part.module, own_heads(part.module, part.layers)
    if isinstance(module, nn.ModuleList) or own is not None:
        return own or []
    if not parts:
        return part.layers[-1:]
    after = _beside_base(module, parts)
    if not after:
        numbers = [i for i, p in enumerate(parts) if p.has_blocks]
        after = parts[numbers[-1] + 1 :] if numbers else _parallel(module, parts)
    ends = [p for i, p in enumerate(after) if not any(p.feeds(q) for q in after[i + 1 :])]
    return [layer for p in ends for layer in p.last] if ends else _last(parts[-1])


def _beside_base(module: nn.Module, parts: Sequence[_Part]) -> Sequence[_Part]:
    """What transformers' models have after what they call their base model, or else before it."""
    base = getattr(module, "base_model", module)
    number = next((i for i, p in enumerate(parts) if p.module is base is not module), None)
    return [] if number is None else parts[number + 1 :] or parts[:number]


def _parallel(module: nn.Module, parts: Sequence[_Part]) -> list[_Part]:
    """The last part and those right before it that read as much and do not feed it, if any."""
    if not parts:
        return []
    last, found = parts[-1], [parts[-1]]
    for part in () if isinstance(module, nn.Sequential) else parts[-2::-1]:
        first, width = last.layers[0], _inputs(last.layers[0])
        if first.kind != part.layers[0].kind or _inputs(part.layers[0]) != width:
            break
        shuffles = isinstance(first.module, CONVS) and _outputs(part.layers[-1]) % width == 0
        if shuffles or _outputs(part.layers[-1]) == width:
            break
        found.insert(0, part)
    return found if len(found) > 1 else []


def _called_head(model: nn.Module, layers: Sequence[Layer]) -> list[Layer]:
    """The last layer of each module outside the blocks that is called a head."""
    lists = [module for module in model.modules() if _is_blocks(module)]
    inside = {m for blocks in lists for m in blocks.modules()}
    found: list[Layer] = []
    for module in model.modules():
        children = {} if module in inside else dict(module.named_children())
        if not any(name == "head" or HEADS.fullmatch(name) for name in children):
            continue
        parts = {name: _Part(child, layers) for name, child in children.items()}
        parts = {name: part for name, part in parts.items() if part.layers}
        for i, (name, part) in enumerate(parts.items()):
            later = list(parts.values())[i + 1 :]
            named = HEADS.fullmatch(name) or (name == "head" and not part.children())
            if named and not any(map(part.feeds, later)):
                found += part.last
    return found
