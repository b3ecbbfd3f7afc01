"""The ends of a network, left dense unless asked for: the stem and the output head."""

from __future__ import annotations

from typing import Any

from torch import nn

from prunus.core.layers import CONVS, Layer, all_layers, clean_name, unwrap


def _heads(model: nn.Module) -> list[Any] | None:
    """The modules that the model itself calls its output head; None if it does not say.

    A backbone of timm says that it has none (an Identity); a distilled one names two.
    """
    if callable(getattr(model, "get_classifier", None)):
        named = model.get_classifier()  # type: ignore[operator]
        return list(named) if isinstance(named, tuple | list) else [named]
    if callable(getattr(model, "get_output_embeddings", None)):
        named = model.get_output_embeddings()  # type: ignore[operator]
        return None if named is None else [named]
    return None


def _in_blocks(model: nn.Module, last: Layer) -> bool:
    return any(
        isinstance(module, nn.ModuleList) and last.name.startswith(clean_name(name) + ".")
        for name, module in model.named_modules()
    )


def ends(model: nn.Module) -> list[Layer]:
    """What is left dense unless asked for: the stem and the output head.

    The stem is the first layer if it is a convolution (pixels, patches); a model that begins with
    an embedding has none. The head is what ``get_classifier`` (timm) or ``get_output_embeddings``
    (transformers) names, else the last layer, unless that is part of a list of blocks.
    """
    layers = list(all_layers(model))
    if not layers:
        return []
    stem = [layers[0]] if isinstance(layers[0].module, CONVS) else []
    inner = unwrap(model)
    heads = _heads(inner)
    if heads is None:
        named = [] if _in_blocks(inner, layers[-1]) else [layers[-1]]
    else:
        inside = {m for head in heads if isinstance(head, nn.Module) for m in head.modules()}
        named = [layer for layer in layers if layer.module in inside]
    return stem + [layer for layer in named if layer not in stem]
