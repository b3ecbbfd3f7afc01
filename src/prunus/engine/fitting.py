"""Which of the chosen layers a method can prune, and why not the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

from prunus.core.layers import Layer
from prunus.core.names import few
from prunus.core.selection import Selection
from prunus.core.sharding import shards_of
from prunus.core.wrappers import is_sharded
from prunus.engine.method import Method
from prunus.pruners import supports

Misfits = Literal["error", "dense"]
MISFITS: tuple[str, ...] = get_args(Misfits)


def fitting_layers(
    method: Method, layers: Sequence[Layer], misfits: Misfits
) -> tuple[list[Layer], dict[str, str]]:
    """The layers as the method wants to see them, and why others stay dense, by their names.

    Layers do not fit if the pattern does not divide them, or on a rank's part of them; if the
    pruner's settings do not go with their width; or if a pruner or an allocator learns from inputs
    that cannot be measured. Raises ValueError for a pattern that the pruner does not have, if no
    layer fits, and, unless ``misfits`` is `dense`, if one does not.
    """
    supports(method.pruner, method.pattern)
    reasons = {layer.name: reason for layer in layers if (reason := _misfit(method, layer))}
    if reasons and (misfits == "error" or len(reasons) == len(layers)):
        first, *others = reasons
        named = "" if reasons[first].startswith(first) else f"{first}: "
        more = f"; nor does it fit {few(others, 10)}" if others else ""
        some = len(reasons) < len(layers)
        remedy = "; or leave what does not fit dense, with misfits: dense" if some else ""
        raise ValueError(f"{named}{reasons[first]}{more}{remedy}")
    fitting = [layer for layer in layers if layer.name not in reasons]
    return method.fit(fitting), {name: reason_of(reason) for name, reason in reasons.items()}


def without_depthwise(method: Method, selection: Selection) -> Selection:
    """The selection; if nobody named its layers, without those whose inputs are not measured.

    Depthwise convolutions have few of a network's weights, and break it first.
    """
    reasons = {
        layer.name: UNMEASURED
        for layer in selection.layers
        if selection.by_default and any(x.no_inputs() for x in method.fit([layer]))
        if method.readers(layer)
    }
    rest = [layer for layer in selection.layers if layer.name not in reasons]
    if not reasons or not rest:
        return selection
    return replace(selection, layers=rest, spared={**selection.spared, **reasons})


UNMEASURED = "depthwise or transposed, so its inputs are not measured"


def reason_of(message: str | ValueError) -> str:
    """What an error says without its remedy."""
    return str(message).partition("; ")[0]


def _misfit(method: Method, layer: Layer) -> str:
    """Why the method cannot prune the layer; empty if it can."""
    parts = method.fit([layer])
    try:
        for part in parts:
            method.pattern.check(*part.matrix_shape(), part.channels())
            method.pruner.check(part.matrix_shape()[1], method.pattern)
        if is_sharded(layer.weight):
            shards_of(parts, method.pattern)
    except ValueError as error:
        return str(error)
    for reason in filter(None, (part.no_inputs() for part in parts)):
        for reader in method.readers(layer):
            return f"{reason}, and {reader} learns from inputs; exclude it"
    return ""
