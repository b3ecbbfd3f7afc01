"""Models of timm: small variants, most of them made smaller still."""

from __future__ import annotations

from research.zoo.architectures import SIZE, timm

WIDE = {"img_size": SIZE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
MIXER = {"img_size": SIZE, "patch_size": 8, "embed_dim": 32, "num_blocks": 2}
WINDOWS = {"img_size": SIZE, "patch_size": 4, "embed_dim": 16, "depths": (1, 1)}
WINDOWS |= {"num_heads": (2, 4), "window_size": 4}
STAGES = {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32)}
CHANNELS = {"layers": (1, 1, 1, 1), "channels": (16, 16, 32, 32)}

TRANSFORMERS = {
    "vit": timm("vit_tiny_patch16_224", **WIDE),
    "vit-backbone": timm("vit_tiny_patch16_224", **WIDE, num_classes=0),
    "deit-distilled": timm("deit_tiny_distilled_patch16_224", **WIDE),
    "beit": timm("beit_base_patch16_224", **WIDE),
    "eva02": timm("eva02_tiny_patch14_224", **WIDE),
    "cait": timm("cait_xxs24_224", **WIDE, depth_token_only=1),
    "xcit": timm("xcit_nano_12_p8_224", **WIDE),
    "swin": timm("swin_tiny_patch4_window7_224", **WINDOWS),
    "swinv2": timm("swinv2_tiny_window8_256", **WINDOWS),
    "pit": timm("pit_ti_224", size=224, depth=(1, 1, 1), base_dims=(8, 8, 8), heads=(2, 2, 2)),
    "pvt-v2": timm("pvt_v2_b0", depths=(1, 1, 1, 1), embed_dims=(16, 16, 40, 64)),
    "twins": timm(
        "twins_svt_small",
        depths=(1, 1, 1, 1),
        embed_dims=(16, 16, 32, 32),
        num_heads=(1, 2, 2, 2),
        img_size=SIZE,
    ),
    "levit": timm(
        "levit_128s", size=224, depth=(1, 1, 1), embed_dim=(32, 48, 64), num_heads=(2, 3, 4)
    ),
    "mobilevit": timm("mobilevit_xxs"),
    "maxvit": timm(
        "maxvit_rmlp_pico_rw_256",
        img_size=64,
        size=64,
        depths=(1, 1),
        embed_dim=(32, 32),
        stem_width=(8, 16),
    ),
    "edgenext": timm("edgenext_xx_small", size=64, depths=(1, 1, 1, 1)),
    "hiera": timm("hiera_tiny_224", img_size=64, size=64, embed_dim=16, stages=(1, 1, 1, 1)),
    "tiny-vit": timm(
        "tiny_vit_5m_224",
        size=64,
        depths=(1, 1, 1, 1),
        embed_dims=(16, 32, 32, 64),
        num_heads=(1, 2, 2, 2),
        window_sizes=(4, 4, 4, 2),
    ),
    "efficientformer": timm(
        "efficientformer_l1", size=224, depths=(1, 1, 1, 1), embed_dims=(16, 16, 32, 32), num_vit=1
    ),
}
MIXERS = {
    "mlp-mixer": timm("MlpMixer", **MIXER),
    "convmixer": timm("ConvMixer", dim=32, depth=2, num_classes=10),
    "poolformer": timm("MetaFormer", depths=(1, 1, 1, 1), dims=(16, 16, 32, 32), num_classes=10),
}
CONVOLUTIONS = {
    "resnet10": timm("resnet10t", channels=(16, 16, 32, 32)),
    "resnet-backbone": timm("resnet10t", channels=(16, 16, 32, 32), num_classes=0),
    "resnext": timm("resnext50_32x4d", layers=(1, 1, 1, 1), channels=(16, 16, 32, 32)),
    "seresnet": timm("seresnet18", layers=(1, 1, 1, 1), channels=(16, 16, 32, 32)),
    "resnetv2": timm("resnetv2_50", layers=(1, 1, 1, 1), channels=(32, 32, 64, 64)),
    "bit": timm("ResNetV2", layers=(1, 1), channels=(128, 128), num_classes=10),
    "res2net": timm("res2net50_14w_8s", layers=(1, 1, 1, 1), channels=(32, 32, 64, 64)),
    "densenet": timm("DenseNet", block_config=(2, 2), growth_rate=8, num_classes=10),
    "regnetx": timm("regnetx_002"),
    "regnety": timm("regnety_002"),
    "repvgg": timm("repvgg_a0"),
    "mobileone": timm("mobileone_s0"),
    "mobilenetv3": timm("mobilenetv3_small_050"),
    "mobilenetv4": timm("mobilenetv4_conv_small_035"),
    "efficientnet-lite": timm("tf_efficientnet_lite0"),
    "mnasnet": timm("mnasnet_small"),
    "ghostnet": timm("ghostnet_050"),
    "lcnet": timm("lcnet_035"),
    "convnext": timm("convnext_atto", **STAGES),
    "convnextv2": timm("convnextv2_atto", **STAGES),
    "nfnet": timm("nf_regnet_b0"),
    "vgg": timm("VGG", cfg=[16, "M", 32, "M", 32, "M"], mlp_ratio=0.01, num_classes=10),
    "dla": timm("dla46_c"),
    "vovnet": timm("ese_vovnet19b_slim_dw"),
    "cspnet": timm("cs3darknet_s"),
    "fastvit": timm("fastvit_t8", layers=(1, 1, 1, 1), embed_dims=(16, 32, 64, 128)),
    "starnet": timm("starnet_s1"),
}
TIMM = {f"timm {name}": each for name, each in {**TRANSFORMERS, **MIXERS, **CONVOLUTIONS}.items()}
