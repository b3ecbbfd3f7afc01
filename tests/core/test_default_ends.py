"""What the default leaves dense, in many architectures: by one forward pass, and by structure."""

import pytest

from prunus.core.default_dense_layers import COMPUTED, READS, ROUTES, WRITES, left_dense
from prunus.core.layers import all_layers

from research.zoo.all import ARCHITECTURES
from research.zoo.timms import TIMM

# transformers' progress bars, and what timm calls itself by old names
pytestmark = pytest.mark.filterwarnings("ignore")
REASONS = {"reads": READS, "writes": WRITES, "routes": ROUTES, "computes": COMPUTED}

TABLE = {
    "llama": "writes lm_head",
    "llama-model": "",
    "llama-classifier": "writes score",
    "phi3": "writes lm_head",
    "gpt2": "writes lm_head",
    "gpt2-two-heads": "writes lm_head multiple_choice_head.summary",
    "opt": "writes lm_head",
    "mamba": "writes lm_head",
    "mamba2": "writes lm_head",
    "rwkv": "writes head",
    "xlnet": "writes lm_loss",
    "qwen2-moe": "writes lm_head; routes model.layers.0.mlp.shared_expert_gate "
    "model.layers.1.mlp.shared_expert_gate",
    "llama4": "writes lm_head; routes model.layers.0.feed_forward.router "
    "model.layers.1.feed_forward.router",
    "dbrx": "writes lm_head; routes transformer.blocks.0.ffn.router.layer "
    "transformer.blocks.1.ffn.router.layer",
    "jetmoe": "writes lm_head; routes model.layers.0.mlp.router.layer "
    "model.layers.0.self_attention.experts.router.layer model.layers.1.mlp.router.layer "
    "model.layers.1.self_attention.experts.router.layer",
    "bert-masked": "writes cls.predictions.decoder",
    "bert-pretraining": "writes cls.predictions.decoder cls.seq_relationship",
    "bert-answers": "writes qa_outputs",
    "bert-model": "writes pooler.dense",
    "roberta-classifier": "writes classifier.out_proj",
    "distilbert-classifier": "writes classifier",
    "electra": "writes discriminator_predictions.dense_prediction",
    "modernbert": "writes decoder",
    "funnel": "writes lm_head",
    "t5": "writes lm_head",
    "t5-encoder": "",
    "bart": "writes lm_head",
    "switch": "writes lm_head; routes encoder.block.1.layer.1.mlp.router.classifier "
    "decoder.block.1.layer.2.mlp.router.classifier",
    "vit": "reads vit.embeddings.patch_embeddings.projection; writes classifier",
    "vit-model": "reads embeddings.patch_embeddings.projection; writes pooler.dense",
    "vit-mae": "reads vit.embeddings.patch_embeddings.projection; writes decoder.decoder_pred",
    "deit-distilled": "reads deit.embeddings.patch_embeddings.projection; "
    "writes cls_classifier distillation_classifier",
    "swin": "reads swin.embeddings.patch_embeddings.projection; writes classifier",
    "swin2sr": "reads swin2sr.first_convolution; writes upsample.final_convolution",
    "resnet": "reads resnet.embedder.embedder.convolution; writes classifier.1",
    "resnet-model": "reads embedder.embedder.convolution",
    "pvt": "reads pvt.encoder.patch_embeddings.0.projection; writes classifier",
    "segformer": "reads segformer.stages.0.patch_embeddings.proj; writes decode_head.classifier",
    "dpt": "reads dpt.embeddings.patch_embeddings.projection; writes head.head.4",
    "detr": "reads model.backbone.model.embedder.embedder.convolution; "
    "writes class_labels_classifier bbox_predictor.layers.2",
    "deformable-detr": "reads model.backbone.model.embedder.embedder.convolution; writes "
    "model.decoder.bbox_embed.0.layers.2 model.decoder.bbox_embed.1.layers.2 class_embed.0",
    "yolos": "reads vit.embeddings.patch_embeddings.projection; "
    "writes class_labels_classifier.layers.2 bbox_predictor.layers.2",
    "maskformer": "reads model.pixel_level_module.encoder.embedder.embedder.convolution; "
    "writes class_predictor mask_embedder.2.0",
    "perceiver": "reads perceiver.input_preprocessor.convnet_1x1; "
    "writes perceiver.decoder.decoder.final_layer",
    "clip": "reads vision_model.embeddings.patch_embedding; "
    "writes visual_projection text_projection",
    "vilt": "reads vilt.embeddings.patch_embeddings.projection; writes classifier.3",
    "llava": "reads model.vision_tower.embeddings.patch_embedding; writes lm_head",
    "wav2vec2": "reads wav2vec2.feature_extractor.conv_layers.0.conv; "
    "computes wav2vec2.encoder.pos_conv_embed.conv; writes lm_head",
    "whisper": "reads model.encoder.conv1; writes proj_out",
    "ast": "reads audio_spectrogram_transformer.embeddings.patch_embeddings.projection; "
    "writes classifier.dense",
    "time-series": "writes parameter_projection.proj.0 parameter_projection.proj.1 "
    "parameter_projection.proj.2",
    "patchtst": "writes head.projection",
    "decision": "writes predict_state predict_action.0 predict_return",
    "timm vit": "reads patch_embed.proj; writes head",
    "timm vit-backbone": "reads patch_embed.proj",
    "timm deit-distilled": "reads patch_embed.proj; writes head head_dist",
    "timm xcit": "reads patch_embed.proj.0.0; writes head",
    "timm twins": "reads patch_embeds.0.proj; writes head",
    "timm mlp-mixer": "reads stem.proj; writes head",
    "timm poolformer": "reads stem.conv; writes head.fc.fc2",
    "timm efficientformer": "reads stem.conv1; writes head head_dist",
    "timm densenet": "reads features.conv0; writes classifier",
    "timm vgg": "reads features.0; writes head.fc",
    "timm lcnet": "reads conv_stem; writes classifier",
    "timm repvgg": "reads stem.conv_kxk.conv stem.conv_1x1.conv; writes head.fc",
    "timm mobileone": "reads stem.conv_kxk.0.conv stem.conv_scale.conv; writes head.fc",
}
STRUCTURE = {
    # what the forward pass shows and names do not: which of a head's layers comes last
    "sam": (
        "reads vision_encoder.patch_embed.projection prompt_encoder.mask_embed.conv1; "
        "writes mask_decoder.upscale_conv2 mask_decoder.output_hypernetworks_mlps.0.proj_out "
        "mask_decoder.output_hypernetworks_mlps.1.proj_out "
        "mask_decoder.output_hypernetworks_mlps.2.proj_out "
        "mask_decoder.output_hypernetworks_mlps.3.proj_out "
        "mask_decoder.iou_prediction_head.proj_out",
        "reads vision_encoder.patch_embed.projection prompt_encoder.mask_embed.conv1; "
        "writes mask_decoder.iou_prediction_head.proj_out "
        "mask_decoder.iou_prediction_head.layers.0",
    ),
    # that a head is for training only
    "upernet": (
        "reads backbone.embedder.embedder.convolution; writes decode_head.classifier",
        "reads backbone.embedder.embedder.convolution; "
        "writes decode_head.classifier auxiliary_head.classifier",
    ),
    # that a pooling block has added its layers to its own input
    "siglip": (
        "reads vision_model.embeddings.patch_embedding; writes text_model.head",
        "reads vision_model.embeddings.patch_embedding; "
        "writes text_model.head vision_model.head.mlp.fc2",
    ),
}
ROWS = {name: (ends, ends) for name, ends in TABLE.items()} | STRUCTURE


def expected(text):
    parts = [part.split() for part in text.split("; ") if part]
    return {name: REASONS[verb] for verb, *names in parts for name in names}


@pytest.mark.parametrize("name", ROWS)
def test_the_ends_of_many_architectures_stay_dense_and_nothing_else(name):
    pytest.importorskip("timm" if name in TIMM else "transformers")
    architecture = ARCHITECTURES[name]
    model, batch = architecture.build().eval(), architecture.batch()
    layers = list(all_layers(model))
    traced, structure = ROWS[name]

    def run():
        return model(**batch) if isinstance(batch, dict) else model(batch)

    assert left_dense(model, layers, run) == expected(traced)
    assert left_dense(model, layers) == expected(structure)


def test_sixty_architectures_are_in_the_table():
    assert len(ROWS) >= 60
