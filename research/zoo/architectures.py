"""Tiny configurations of many architectures, with random weights and a batch for each.

Sizes are multiples of 8, so that 2:4 fits wherever an architecture allows it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

SIZE, PATCH, TOKENS, VOCABULARY = 32, 8, 8, 64
BATCH = 2
Batch = dict[str, Any] | Tensor


class Architecture(NamedTuple):
    """How to build a model, and what to run it on."""

    build: Callable[[], nn.Module]
    batch: Callable[[], Batch]


def floats(*shape: int) -> Tensor:
    return torch.randn(shape)


def ids(*shape: int) -> Tensor:
    return torch.randint(3, VOCABULARY, shape)


def tokens() -> Batch:
    """Text without padding."""
    return {"input_ids": ids(BATCH, TOKENS), "attention_mask": torch.ones(BATCH, TOKENS).long()}


def pairs() -> Batch:
    """Text for an encoder, and other text for its decoder."""
    return {"input_ids": ids(BATCH, TOKENS), "decoder_input_ids": ids(BATCH, TOKENS - 2)}


def pixels() -> Batch:
    return {"pixel_values": floats(BATCH, 3, SIZE, SIZE)}


def image() -> Batch:
    return floats(BATCH, 3, SIZE, SIZE)


def captions() -> Batch:
    """Images, and as many texts."""
    return {**tokens(), "pixel_values": floats(BATCH, 3, SIZE, SIZE)}


def waves() -> Batch:
    return {"input_values": floats(BATCH, 1600)}


def hf(name: str, batch: Callable[[], Batch], **settings: Any) -> Architecture:
    """A class of transformers, by its name and what its configuration should be."""

    def build() -> nn.Module:
        import transformers

        transformers.logging.set_verbosity_error()
        cls = getattr(transformers, name)
        config = cls.config_class(**settings)
        if hasattr(config, "use_cache"):  # passes must not know of each other
            config.use_cache = False
        return cls(config)

    return Architecture(build, batch)


def timm(name: str, size: int = SIZE, **settings: Any) -> Architecture:
    """A model of timm by its name, or a class in `timm.models`."""

    def build() -> nn.Module:
        import timm

        if name in vars(timm.models) and isinstance(getattr(timm.models, name), type):
            return getattr(timm.models, name)(**settings)
        return timm.create_model(name, pretrained=False, **{"num_classes": 10, **settings})

    return Architecture(build, lambda: floats(BATCH, 3, size, size))


WIDE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
TEXT = {**WIDE, "max_position_embeddings": 64, "pad_token_id": 0}
GROUPED = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {**GROUPED, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
}
VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": SIZE,
    "patch_size": PATCH,
}
SWIN = {
    "image_size": SIZE,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
STAGES = {"hidden_sizes": [16, 32], "depths": [2, 2]}
WAVE = {
    **WIDE,
    "conv_dim": (16, 16),
    "conv_kernel": (10, 4),
    "conv_stride": (10, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "mask_time_length": 2,
    "apply_spec_augment": False,
}
