"""The config of a transformers model says the new sizes where it can."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prunus.channels.groups import Channels, Group
from prunus.channels.surgery import Change

INNER = (
    "intermediate_size",
    "ffn_dim",
    "n_inner",
    "d_ff",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "moe_intermediate_size",
)
HEADS = ("num_attention_heads", "num_heads", "n_head", "encoder_attention_heads")
KV_HEADS = ("num_key_value_heads",)
WIDTH = ("hidden_size", "d_model", "n_embd", "word_embed_proj_dim")


def follow_config(model: nn.Module, found: Channels, gone: Tensor, change: Change) -> list[str]:
    """Set the fields that all blocks agree on; a remark where the config cannot say it."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return []
    alike = {(g.kind, bool(g.norms), g.size, kept): g for g, kept in _kept(found, gone)}
    for (*_, kept), group in alike.items():
        _follow(config, group, kept, change)
    if rebuilds(model):
        return []
    return [
        "the config cannot express these shapes: save() of prunus.channels writes them beside the "
        "weights, and uniform=True keeps to what it can express"
    ]


def _kept(found: Channels, gone: Tensor) -> list[tuple[Group, int]]:
    pairs = [(g, g.size - int(gone[g.components].sum())) for g in found.groups]
    return [(g, kept) for g, kept in pairs if kept < g.size]


def _follow(config: Any, group: Group, kept: int, change: Change) -> None:
    old, new = group.size, kept
    fields: tuple[str, ...] = INNER
    if group.norms:
        fields = WIDTH
    elif group.kind in ("head", "kv_group"):
        _follow_heads(config, group, old, new, change)
        return
    for name in fields:
        value = getattr(config, name, None)
        if value == old or (name == "n_inner" and value is None and hasattr(config, name)):
            change.attribute(config, name, new)


def _follow_heads(config: Any, group: Group, old: int, new: int, change: Change) -> None:
    """Query heads follow key/value heads in proportion; the size of a head stays."""
    heads = next((n for n in HEADS if isinstance(getattr(config, n, None), int)), None)
    if heads is None:
        return
    count = getattr(config, heads)
    size = getattr(config, "head_dim", None)
    if size is None and hasattr(config, "head_dim") and hasattr(config, "hidden_size"):
        change.attribute(config, "head_dim", config.hidden_size // count)
    kv = next((n for n in KV_HEADS if getattr(config, n, None) == old), None)
    if kv is not None:
        change.attribute(config, kv, new)
        change.attribute(config, heads, count // old * new)
    elif count == old:
        change.attribute(config, heads, new)


def rebuilds(model: nn.Module) -> bool:
    """Whether a model built from the config has the shapes of this one."""
    config: Any = model.config
    try:
        with torch.device("meta"):
            fresh = type(model)(config)
    except Exception:
        return False
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    return shapes == {name: t.shape for name, t in fresh.state_dict().items()}
