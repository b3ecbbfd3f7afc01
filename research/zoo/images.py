"""Models of transformers that read images."""

from __future__ import annotations

from research.zoo.architectures import (
    BATCH,
    PATCH,
    SIZE,
    STAGES,
    SWIN,
    VIT,
    Batch,
    floats,
    hf,
    pixels,
)

RESNET = {**STAGES, "embedding_size": 16, "layer_type": "basic", "out_features": ["stage2"]}
DETR = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_queries": 8,
    "num_labels": 5,
}


def resnet(*stages: str) -> dict:
    return {"model_type": "resnet", **RESNET, "out_features": list(stages or ["stage2"])}


def video() -> Batch:
    return {"pixel_values": floats(BATCH, 4, 3, SIZE, SIZE)}


IMAGES = {
    "vit": hf("ViTForImageClassification", pixels, **VIT),
    "vit-model": hf("ViTModel", pixels, **VIT),
    "vit-mae": hf(
        "ViTMAEForPreTraining",
        pixels,
        **VIT,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
    ),
    "vit-masked": hf("ViTForMaskedImageModeling", pixels, **VIT, encoder_stride=8),
    "deit-distilled": hf("DeiTForImageClassificationWithTeacher", pixels, **VIT),
    "dinov2": hf("Dinov2ForImageClassification", pixels, **VIT),
    "beit": hf("BeitForImageClassification", pixels, **VIT),
    "swin": hf("SwinForImageClassification", pixels, **SWIN),
    "swinv2": hf("Swinv2ForImageClassification", pixels, **SWIN),
    "swin2sr": hf(
        "Swin2SRForImageSuperResolution",
        pixels,
        image_size=SIZE,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 2],
        window_size=4,
    ),
    "convnext": hf("ConvNextForImageClassification", pixels, **STAGES, num_stages=2),
    "convnextv2": hf("ConvNextV2ForImageClassification", pixels, **STAGES, num_stages=2),
    "resnet": hf("ResNetForImageClassification", pixels, **RESNET),
    "resnet-model": hf("ResNetModel", pixels, **RESNET),
    "regnet": hf(
        "RegNetForImageClassification", pixels, **STAGES, embedding_size=16, groups_width=8
    ),
    "mobilenet-v2": hf("MobileNetV2ForImageClassification", pixels, depth_multiplier=0.25),
    "mobilevit": hf(
        "MobileViTForImageClassification",
        pixels,
        image_size=64,
        hidden_sizes=[16, 24, 32],
        neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 32],
        num_attention_heads=2,
    ),
    "pvt": hf(
        "PvtForImageClassification",
        pixels,
        image_size=SIZE,
        depths=[1, 1, 1, 1],
        hidden_sizes=[16, 16, 32, 32],
        sequence_reduction_ratios=[2, 2, 1, 1],
        num_attention_heads=[1, 2, 2, 2],
    ),
    "poolformer": hf(
        "PoolFormerForImageClassification",
        pixels,
        depths=[1, 1, 1, 1],
        hidden_sizes=[16, 16, 32, 32],
    ),
    "efficientnet": hf(
        "EfficientNetForImageClassification",
        pixels,
        width_coefficient=0.25,
        depth_coefficient=0.25,
        hidden_dim=320,
    ),
    "segformer": hf(
        "SegformerForSemanticSegmentation",
        pixels,
        depths=[1, 1, 1, 1],
        hidden_sizes=[16, 16, 32, 32],
        num_attention_heads=[1, 2, 2, 2],
        decoder_hidden_size=32,
    ),
    "upernet": hf(
        "UperNetForSemanticSegmentation",
        pixels,
        backbone_config={
            **resnet("stage1", "stage2", "stage3"),
            "hidden_sizes": [16, 16, 16],
            "depths": [1, 1, 1],
        },
        hidden_size=16,
        pool_scales=[1, 2],
        use_auxiliary_head=True,
        auxiliary_in_channels=16,
        auxiliary_channels=16,
        auxiliary_loss_weight=0.4,
    ),
    "dpt": hf(
        "DPTForDepthEstimation",
        pixels,
        **{**VIT, "num_hidden_layers": 4},
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[16, 16, 32, 32],
        fusion_hidden_size=16,
    ),
    "glpn": hf(
        "GLPNForDepthEstimation",
        pixels,
        depths=[1, 1, 1, 1],
        hidden_sizes=[16, 16, 32, 32],
        num_attention_heads=[1, 2, 2, 2],
        decoder_hidden_size=16,
    ),
    "detr": hf("DetrForObjectDetection", pixels, **DETR, backbone_config=resnet()),
    "conditional-detr": hf(
        "ConditionalDetrForObjectDetection", pixels, **DETR, backbone_config=resnet()
    ),
    "deformable-detr": hf(
        "DeformableDetrForObjectDetection",
        pixels,
        **DETR,
        backbone_config=resnet("stage1", "stage2"),
        num_feature_levels=2,
        with_box_refine=True,
    ),
    "rt-detr": hf(
        "RTDetrForObjectDetection",
        pixels,
        backbone_config={
            "model_type": "rt_detr_resnet",
            "hidden_sizes": [8, 16, 16, 32],
            "depths": [1, 1, 1, 1],
            "embedding_size": 8,
            "layer_type": "basic",
            "out_features": ["stage2", "stage3", "stage4"],
        },
        encoder_in_channels=[16, 16, 32],
        encoder_hidden_dim=16,
        encoder_ffn_dim=32,
        feat_strides=[8, 16, 32],
        encoder_layers=1,
        encoder_attention_heads=2,
        d_model=16,
        num_queries=8,
        decoder_in_channels=[16, 16, 16],
        decoder_layers=2,
        decoder_ffn_dim=32,
        decoder_attention_heads=2,
        num_denoising=0,
    ),
    "yolos": hf(
        "YolosForObjectDetection",
        pixels,
        **{**VIT, "image_size": [SIZE, SIZE]},
        num_detection_tokens=4,
    ),
    "maskformer": hf(
        "MaskFormerForInstanceSegmentation",
        pixels,
        backbone_config=resnet("stage1", "stage2"),
        decoder_config={
            "model_type": "detr",
            **{k: v for k, v in DETR.items() if k != "num_labels"},
        },
        fpn_feature_size=32,
        mask_feature_size=32,
    ),
    "sam": hf(
        "SamModel",
        pixels,
        vision_config={
            **VIT,
            "output_channels": 16,
            "window_size": 2,
            "global_attn_indexes": [1],
            "mlp_dim": 64,
            "num_pos_feats": 8,
        },
        prompt_encoder_config={
            "hidden_size": 16,
            "image_size": SIZE,
            "patch_size": PATCH,
            "mask_input_channels": 8,
        },
        mask_decoder_config={
            "hidden_size": 16,
            "mlp_dim": 32,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "iou_head_hidden_dim": 16,
        },
    ),
    "perceiver": hf(
        "PerceiverForImageClassificationLearned",
        pixels,
        num_latents=8,
        d_latents=32,
        d_model=512,
        num_blocks=1,
        num_self_attends_per_block=1,
        num_self_attention_heads=2,
        num_cross_attention_heads=1,
        image_size=SIZE,
    ),
    "videomae": hf("VideoMAEForVideoClassification", video, **VIT, num_frames=4, tubelet_size=2),
}
