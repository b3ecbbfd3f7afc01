"""Small models of every structure that folds know, all parameters random, in float64."""

import timm
import torch
import transformers as hf
from timm.layers import GluMlp, LayerNorm, Mlp, SwiGLU
from timm.layers.attention import Attention, AttentionRope
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TEXT = {**SMALL, "vocab_size": 32, "max_position_embeddings": 16, "bos_token_id": 0}
TEXT |= {"eos_token_id": 1, "pad_token_id": 0}
GROUPED = {**TEXT, "num_key_value_heads": 2}
VIT = {"embed_dim": 16, "num_heads": 4, "depth": 2, "img_size": 16, "patch_size": 8}
IMAGE = {**SMALL, "image_size": 16, "patch_size": 8}
OPT = {**TEXT, "ffn_dim": 24, "word_embed_proj_dim": 16}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 32, "n_positions": 16}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 1}


def exact_norms(model):
    """RMS norms of transformers round to float32 whatever their input is; torch's do not."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                setattr(parent, name, nn.RMSNorm(child.weight.shape, eps=1e-6))


def randomize(model):
    exact_norms(model)
    model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.4 + (0.6 if p.dim() == 1 else 0))
        for module in model.modules():
            if isinstance(getattr(module, "running_var", None), torch.Tensor):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model


def tokens(model):
    return (torch.randint(2, 32, (2, 6)),), {}


def decoder_tokens(model):
    # a cache would hold values, which do move
    return (torch.randint(2, 32, (2, 6)),), {"use_cache": False}


def images(size):
    return lambda model: ((torch.randn(2, 3, size, size, dtype=torch.float64),), {})


def features(*shape):
    return lambda model: ((torch.randn(shape, dtype=torch.float64),), {})


def clip_inputs(model):
    pixels = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    return (), {"input_ids": torch.randint(2, 32, (2, 6)), "pixel_values": pixels}


def attention_inputs(model):
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    return (x, x, x), {"need_weights": False}


def small_swin():
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        embed_dim=16,
        depths=(1, 1),
        num_heads=(2, 4),
        img_size=56,
        num_classes=5,
    )


def small_resnet(block, **more):
    return ResNet(block, (1,) * 4, channels=(8,) * 4, num_classes=5, **more)


def plain_cnn():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.PReLU(8),
        nn.Sequential(nn.MaxPool2d(2), nn.Dropout(), nn.Conv2d(8, 12, 3, bias=False)),
        nn.BatchNorm2d(12, affine=False),
        nn.GELU(),
        nn.Conv2d(12, 4, 1),
    )


def timm_vit(name, **more):
    return lambda: timm.create_model(name, num_classes=5, **VIT, **more)


def llama(**more):
    return hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, attention_bias=True, **more))


def qwen2():
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED))


def opt():
    return hf.OPTForCausalLM(hf.OPTConfig(**OPT))


def gpt2():
    return hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2))


def bert():
    return hf.BertForMaskedLM(hf.BertConfig(**TEXT))


def clip():
    return hf.CLIPModel(hf.CLIPConfig(text_config=TEXT, vision_config=IMAGE, projection_dim=8))


# name: (model, its inputs, names of some folds and (groups, copies, width) of their positions)
HEADS, ONE, HIDDEN = (4, 1, 4), (2, 2, 4), (1, 1, 24)
TORCH_BLOCK = {"batch_first": True, "dim_feedforward": 24, "dropout": 0.0}
LLAMA_FOLDS = {
    "model.layers.1.self_attn.o_proj <- v_proj": ONE,
    "model.layers.0.mlp.down_proj <- up_proj, gate_proj": HIDDEN,
}
VIT_FOLDS = {"blocks.1.attn.proj <- qkv": HEADS, "blocks.0.mlp.fc2 <- fc1": (1, 1, 64)}
MODELS = {
    "llama": (llama, decoder_tokens, LLAMA_FOLDS),
    "qwen2": (qwen2, decoder_tokens, LLAMA_FOLDS),
    "qwen3": (
        lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED, head_dim=8)),
        decoder_tokens,
        {**LLAMA_FOLDS, "model.layers.1.self_attn.o_proj <- v_proj": (2, 2, 8)},
    ),
    "mistral": (
        lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED)),
        decoder_tokens,
        LLAMA_FOLDS,
    ),
    "phi3": (
        lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**GROUPED)),
        decoder_tokens,
        {
            "model.layers.1.self_attn.o_proj <- qkv_proj": ONE,
            "model.layers.0.mlp.down_proj <- gate_up_proj": HIDDEN,
        },
    ),
    "opt": (
        opt,
        decoder_tokens,
        {
            "model.decoder.layers.0.self_attn.out_proj <- v_proj": HEADS,
            "model.decoder.layers.1.fc2 <- fc1": HIDDEN,
        },
    ),
    "gpt2": (
        gpt2,
        decoder_tokens,
        {
            "transformer.h.0.attn.c_proj <- c_attn": HEADS,
            "transformer.h.1.mlp.c_proj <- c_fc": (1, 1, 64),
        },
    ),
    "bert": (
        bert,
        tokens,
        {
            "bert.encoder.layer.0.attention.output.dense <- self.value": HEADS,
            "bert.encoder.layer.1.output.dense <- intermediate.dense": HIDDEN,
        },
    ),
    "hf_vit": (
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**IMAGE)),
        images(16),
        {
            "vit.layers.0.attention.o_proj <- v_proj": HEADS,
            "vit.layers.1.mlp.fc2 <- fc1": HIDDEN,
        },
    ),
    "clip": (
        clip,
        clip_inputs,
        {"text_model.encoder.layers.0.self_attn.out_proj <- v_proj": HEADS},
    ),
    "vit": (timm_vit("vit_tiny_patch16_224"), images(16), VIT_FOLDS),
    "deit3": (timm_vit("deit3_small_patch16_224"), images(16), VIT_FOLDS),
    "deit_distilled": (timm_vit("deit_tiny_distilled_patch16_224"), images(16), VIT_FOLDS),
    "eva02": (
        timm_vit("eva02_tiny_patch14_224"),
        images(16),
        {"blocks.0.attn.proj <- qkv": HEADS, "blocks.1.mlp.fc2 <- fc1": (1, 1, 42)},
    ),
    "swin": (small_swin, images(56), {"layers.1.blocks.0.attn.proj <- qkv": (4, 1, 8)}),
    "basic": (
        lambda: small_resnet(BasicBlock),
        images(32),
        {"layer1.0.conv2 <- conv1": (1, 1, 8)},
    ),
    "bottleneck": (
        lambda: small_resnet(Bottleneck),
        images(32),
        {"layer1.0.conv2 <- conv1": (1, 1, 8), "layer2.0.conv3 <- conv2": (1, 1, 8)},
    ),
    "sequential": (
        plain_cnn,
        images(14),
        {"3.2 <- 0": (1, 1, 8), "6 <- 3.2": (1, 1, 12)},
    ),
    "mlp": (lambda: Mlp(16, 24, norm_layer=LayerNorm), features(5, 16), {"fc2 <- fc1": HIDDEN}),
    "glu": (lambda: GluMlp(16, 48, norm_layer=LayerNorm), features(5, 16), {"fc2 <- fc1": HIDDEN}),
    "swiglu": (lambda: SwiGLU(16, 24), features(5, 16), {"fc2 <- fc1_g, fc1_x": HIDDEN}),
    "convolutions": (
        lambda: Mlp(16, 24, use_conv=True),
        features(2, 16, 3, 3),
        {"fc2 <- fc1": HIDDEN},
    ),
    "norm_and_gate": (
        lambda: Attention(16, 4, qkv_bias=True, scale_norm=True, gated=True, norm_layer=LayerNorm),
        features(2, 5, 16),
        {"proj <- qkv": HEADS},
    ),
    "unfused": (
        lambda: AttentionRope(16, 4, qkv_fused=False),
        features(2, 5, 16),
        {"proj <- v_proj": HEADS},
    ),
    "multihead": (
        lambda: nn.MultiheadAttention(16, 4, batch_first=True),
        attention_inputs,
        {"out_proj <- in_proj_weight": HEADS},
    ),
    "torch_block": (
        lambda: nn.TransformerEncoderLayer(16, 4, **TORCH_BLOCK),
        features(2, 5, 16),
        {"self_attn.out_proj <- in_proj_weight": HEADS, "linear2 <- linear1": HIDDEN},
    ),
}


def built(name):
    """(model, args, kwargs) with everything random."""
    make, inputs, _ = MODELS[name]
    model = randomize(make())
    return model, *inputs(model)


def outputs(model, args, kwargs):
    with torch.no_grad():
        out = model(*args, **kwargs)
    if isinstance(out, dict):
        return next(out[key] for key in ("logits", "logits_per_image") if key in out)
    return out[0] if isinstance(out, tuple) else out


def random_perms(fold):
    groups, _, width = fold.positions.shape
    return torch.stack([torch.randperm(width) for _ in range(groups)])
