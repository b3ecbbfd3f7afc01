"""Models of transformers that read recordings, series, or images and texts together."""

from __future__ import annotations

import torch

from research.zoo.architectures import (
    BATCH,
    SEQ2SEQ,
    SIZE,
    TEXT,
    TOKENS,
    VIT,
    WAVE,
    WIDE,
    Batch,
    captions,
    floats,
    hf,
    ids,
    waves,
)

TOWER = {**VIT, "projection_dim": 32}
CLIP = {"text_config": {**TEXT, "projection_dim": 32, "eos_token_id": 2}, "vision_config": TOWER}


def mel(channels: int, frames: int) -> Batch:
    return {"input_features": floats(BATCH, channels, frames)}


def whisper() -> Batch:
    return {**mel(8, 32), "decoder_input_ids": ids(BATCH, TOKENS)}


def speech() -> Batch:
    return {**mel(32, 16), "decoder_input_ids": ids(BATCH, TOKENS)}


def story() -> Batch:
    """An image in a text: as many placeholders as the image has patches."""
    text = ids(BATCH, TOKENS + 16).clamp(max=50)
    text[:, 2:18] = 60
    return {"input_ids": text, "pixel_values": floats(BATCH, 3, SIZE, SIZE)}


def past() -> Batch:
    return {
        "past_values": floats(BATCH, 16, 2),
        "past_time_features": floats(BATCH, 16, 1),
        "past_observed_mask": torch.ones(BATCH, 16, 2),
        "future_time_features": floats(BATCH, 4, 1),
        "future_values": floats(BATCH, 4, 2),
    }


SERIES = {
    "input_size": 2,
    "prediction_length": 4,
    "context_length": 12,
    "lags_sequence": [1, 2, 3, 4],
}
SERIES |= {"num_time_features": 1, **{k: v for k, v in SEQ2SEQ.items() if k[0] != "v"}}
SERIES.pop("max_position_embeddings")

READING = {
    "clip": hf("CLIPModel", captions, **CLIP, projection_dim=32),
    "siglip": hf(
        "SiglipModel", captions, text_config={**TEXT, "projection_size": 32}, vision_config=VIT
    ),
    "blip": hf(
        "BlipForConditionalGeneration",
        captions,
        text_config={**TEXT, "encoder_hidden_size": 32},
        vision_config=VIT,
    ),
    "vilt": hf("ViltForQuestionAnswering", captions, **{**VIT, **TEXT}, num_labels=3),
    "llava": hf(
        "LlavaForConditionalGeneration",
        story,
        text_config={"model_type": "llama", **TEXT},
        vision_config={"model_type": "clip_vision_model", **VIT},
        image_token_id=60,
        image_token_index=60,
    ),
}
HEARING = {
    "wav2vec2": hf("Wav2Vec2ForCTC", waves, **WAVE),
    "hubert": hf("HubertForSequenceClassification", waves, **WAVE, classifier_proj_size=16),
    "wavlm": hf("WavLMForCTC", waves, **WAVE),
    "whisper": hf(
        "WhisperForConditionalGeneration",
        whisper,
        **SEQ2SEQ,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=32,
        pad_token_id=0,
        decoder_start_token_id=1,
    ),
    "speech-to-text": hf(
        "Speech2TextForConditionalGeneration",
        speech,
        **SEQ2SEQ,
        input_feat_per_channel=16,
        conv_channels=32,
        max_source_positions=64,
        max_target_positions=32,
    ),
    "ast": hf(
        "ASTForAudioClassification",
        lambda: {"input_values": floats(BATCH, 32, 32)},
        **WIDE,
        max_length=32,
        num_mel_bins=32,
    ),
}
FORECASTING = {
    "time-series": hf("TimeSeriesTransformerForPrediction", past, **SERIES),
    "informer": hf("InformerForPrediction", past, **SERIES),
    "patchtst": hf(
        "PatchTSTForPrediction",
        lambda: {"past_values": floats(BATCH, 16, 2)},
        num_input_channels=2,
        context_length=16,
        patch_length=4,
        patch_stride=4,
        d_model=32,
        num_attention_heads=4,
        num_hidden_layers=2,
        ffn_dim=64,
        prediction_length=4,
    ),
    "decision": hf(
        "DecisionTransformerModel",
        lambda: {
            "states": floats(BATCH, 4, 8),
            "actions": floats(BATCH, 4, 2),
            "rewards": floats(BATCH, 4, 1),
            "returns_to_go": floats(BATCH, 4, 1),
            "timesteps": torch.arange(4).expand(BATCH, 4),
        },
        state_dim=8,
        act_dim=2,
        hidden_size=32,
        max_ep_len=16,
        n_layer=2,
        n_head=4,
    ),
}
SIGNALS = {**READING, **HEARING, **FORECASTING}
