"""What modules say about their sizes in attributes, by the names that libraries use."""

from __future__ import annotations

from torch import nn

HEADS = (
    "num_heads",
    "num_attention_heads",
    "n_heads",
    "n_head",
    "heads",
    "nhead",
    "num_key_value_heads",
    "num_kv_heads",
    "kv_heads",
    "n_kv_heads",
)
TOTALS = ("attn_dim", "val_attn_dim", "key_attn_dim", "all_head_size", "out_dim", "inner_dim")
WIDTHS = (
    "attention_dim",
    "split_size",
    "embed_dim",
    "attn_size",
    "q_dim",
    "kv_dim",
    "hidden_size",
    "dim",
    "d_model",
)
OWN = ("hidden_dim", "hidden_size", "intermediate_dim", "intermediate_size", "dim", "embed_dim")
PARTS = (*WIDTHS, "width", "chunk_size", "hidden_dim", "hidden_features", "part_size")
SHAPES = ("shape", "scale_shape", "bias_shape")
RMS_EPS = ("eps", "variance_epsilon", "epsilon")


def head_counts(module: nn.Module) -> dict[str, int]:
    """The numbers of heads that a module states, by attribute."""
    found = {name: vars(module).get(name) for name in HEADS}
    return {name: n for name, n in found.items() if isinstance(n, int) and not isinstance(n, bool)}


def is_rms_norm(module: nn.Module) -> bool:
    named = "RMSNorm" in type(module).__name__ or type(module).__name__ == "T5LayerNorm"
    return named and any(hasattr(module, name) for name in RMS_EPS)


def has_offset_weight(module: nn.Module) -> bool:
    """Whether an RMSNorm multiplies by one plus its weight, as Gemma's does."""
    name = type(module).__name__
    return name.startswith(("Gemma", "Qwen3Next", "RecurrentGemma")) and is_rms_norm(module)
