"""Attention: the output projection's columns are rows of the values, head by head.

Within a head the values' channels may move; under grouped-query attention they move alike for all
query heads that share a key/value head. Rows of queries and keys never do: rotary embeddings
treat them by position.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from prunus.core.layers import Layer
from prunus.engine.permute.folds import Fold, FoldError, Slot
from prunus.engine.permute.graph import Network, join, straight
from prunus.engine.permute.passthrough import passes

# writers whose last rows are the values, after those of queries and keys
FUSED = ("qkv", "qkv_proj", "c_attn", "in_proj_weight")
HEAD_DIM = ("head_dim", "attention_head_size")
HEADS = ("num_heads", "num_attention_heads", "n_head")
ASIDE = ("q_proj", "k_proj", "q_norm", "k_norm")  # they do not touch values


def _share(channels: int, heads: int) -> int:
    if heads < 1 or channels % heads:
        raise FoldError(f"{heads} heads do not divide its {channels} inputs")
    return channels // heads


def _head_dim(net: Network, parent: str, writer: str, channels: int) -> int:
    """Channels of one head, as the modules or their configurations say."""
    holders: list[object] = [net.modules[join(parent, writer.rpartition(".")[0])]]
    holders.append(net.modules[parent])
    holders += [getattr(holder, "config", None) for holder in (*holders, net.model)]
    for holder in holders:
        for attribute in HEAD_DIM:
            if isinstance(size := getattr(holder, attribute, None), int):
                return size
        for attribute in HEADS:
            if isinstance(heads := getattr(holder, attribute, None), int):
                return _share(channels, heads)
    raise FoldError(f"no attribute of {parent} tells the number of heads ({', '.join(HEADS)})")


def _values(net: Network, parent: str, writer: str, channels: int) -> tuple[int, int]:
    """(rows of the values, rows before them) in the layer that writes them."""
    own = net.modules[parent]._parameters.get(writer)
    rows = len(own) if own is not None else net.rows(join(parent, writer))
    if writer not in FUSED:
        return rows, 0
    return (rows - channels) // 2, (rows + channels) // 2


def _value_slots(net: Network, parent: str, writer: str, positions: Tensor) -> list[Slot]:
    module = net.modules[parent]
    own = module._parameters.get(writer)
    if own is None:
        name = join(parent, writer)
        return net.writes(name, positions, net.rows(name))
    slots = [net.slot(module, writer, 0, positions, len(own))]
    if module._parameters.get("in_proj_bias") is not None:
        slots.append(net.slot(module, "in_proj_bias", 0, positions, len(own)))
    return slots


def _further_slots(
    net: Network, parent: str, between: Mapping[str, str], order: Tensor, values: Tensor
) -> list[Slot]:
    """What stands beside the projections: a bias of its own, a norm over all heads, a gate."""
    slots, module = [], net.modules[parent]
    if isinstance(getattr(module, "v_bias", None), nn.Parameter):
        slots.append(net.slot(module, "v_bias", 0, values, values.numel()))
    for child, name in between.items():
        if child == "gate" and isinstance(net.modules[name], nn.Linear):
            slots += net.writes(name, order, order.numel())
        elif child not in ASIDE:
            slots += passes(net, name, order, order.numel())
    return slots


def attention(
    net: Network, layer: Layer, parent: str, writer: str, between: Mapping[str, str]
) -> Fold:
    """One group for each key/value head, a copy of it for each query head. Raises FoldError."""
    channels = layer.channels()
    width = _head_dim(net, parent, writer, channels)
    rows, offset = _values(net, parent, writer, channels)
    if width < 1 or rows < 1 or channels % rows or rows % width:
        raise FoldError(
            f"{rows} rows of {join(parent, writer)} and {channels} inputs are no heads of {width}"
        )
    order = straight(rows // width, channels // rows, width)
    values = straight(rows // width, 1, width)
    slots = [net.reads(layer, order), *_value_slots(net, parent, writer, values + offset)]
    slots += _further_slots(net, parent, between, order, values)
    return net.fold(f"{layer.name} <- {writer}", "attention", (layer,), order, slots)
