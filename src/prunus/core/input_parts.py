"""Layers whose rows are multiplied with different inputs, cut into parts that have one each."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from prunus.core.fused_qkv import qkv_parts
from prunus.core.layers import Layer
from prunus.core.pieces import Piece


def input_parts(layer: Layer) -> list[Layer]:
    """The groups of a convolution; q, k and v of attention's own weight; else the layer itself.

    A depthwise convolution stays whole: each of its groups is a single channel.
    """
    if layer.piece is not None:
        return [layer]
    if isinstance(layer.module, nn.MultiheadAttention) and layer.name.endswith("in_proj_weight"):
        return qkv_parts(layer)
    groups = getattr(layer.module, "groups", 1) if layer.is_convolution else 1
    if groups == 1 or layer.channels() == 1:
        return [layer]
    return [
        replace(layer, name=f"{layer.name}[{i}]", piece=Piece("group", i, groups))
        for i in range(groups)
    ]
