"""Models of several towers: which tokens each of their layers sees, and batches of equal lengths."""

import torch
from torch import nn

import prunus

from tests.helpers.blocks import VOCABULARY

LENGTH, EXAMPLES = 6, 2
TEXT, DECODER = "attention_mask", "decoder_attention_mask"


def mask(lengths, left=False):
    rows = [[0] * (LENGTH - n) + [1] * n if left else [1] * n + [0] * (LENGTH - n) for n in lengths]
    return torch.tensor(rows)


def ids(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY - 2, (EXAMPLES, LENGTH), generator=generator)


def text(left=False, count=2):
    """One sequence."""
    return [
        {"input_ids": ids(i), TEXT: mask((LENGTH, LENGTH - 2 - i % 3), left)} for i in range(count)
    ]


def translations(left=False, count=2):
    """Two sequences of the same length, with other padding in each."""
    return [
        {
            **batch,
            "decoder_input_ids": ids(10 + i),
            DECODER: mask((LENGTH - 1 - i % 3, LENGTH), left),
        }
        for i, batch in enumerate(text(left, count))
    ]


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    small = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    config = T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **small)
    return T5ForConditionalGeneration(config)


SMALL = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}


def bart():
    from transformers import BartConfig, BartForConditionalGeneration

    return BartForConditionalGeneration(BartConfig(**SMALL, decoder_start_token_id=2))


def pegasus():
    from transformers import PegasusConfig, PegasusForConditionalGeneration

    return PegasusForConditionalGeneration(PegasusConfig(**SMALL, decoder_start_token_id=2))


def marian():
    from transformers import MarianConfig, MarianMTModel

    return MarianMTModel(MarianConfig(**SMALL, decoder_start_token_id=2))


def whisper():
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    small = {k: v for k, v in SMALL.items() if k != "max_position_embeddings"}
    lengths = {"max_source_positions": LENGTH, "max_target_positions": 16, "num_mel_bins": 8}
    config = WhisperConfig(**small, **lengths, decoder_start_token_id=2, suppress_tokens=None)
    return WhisperForConditionalGeneration(config)


def speech(left=False, count=2):
    """As many frames, once halved, as there are tokens."""
    return [
        {
            "input_features": torch.randn(EXAMPLES, 8, 2 * LENGTH),
            "decoder_input_ids": batch["input_ids"],
            DECODER: batch[TEXT],
            TEXT: torch.ones(EXAMPLES, 2 * LENGTH, dtype=torch.int64),
        }
        for batch in text(left, count)
    ]


def clip():
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    tower |= {"num_attention_heads": 2, "projection_dim": 8}
    words = {"vocab_size": VOCABULARY, "max_position_embeddings": 16, "eos_token_id": 39}
    image = {"image_size": 10, "patch_size": 4, "num_channels": 3}  # 2 x 2 patches, and one more
    return CLIPModel(CLIPConfig(text_config={**tower, **words}, vision_config={**tower, **image}))


def captions(left=False, count=2):
    """As many words as patches."""
    return [
        {
            "input_ids": batch["input_ids"][:, 1:],
            TEXT: batch[TEXT][:, 1:],
            "pixel_values": torch.randn(EXAMPLES, 3, 10, 10),
        }
        for batch in text(left, count)
    ]


def vilt():
    from transformers import ViltConfig, ViltModel

    small = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 16}
    return ViltModel(ViltConfig(**small, image_size=8, patch_size=4))


def pictures(left=False, count=2):
    return [
        {**batch, "pixel_values": torch.randn(EXAMPLES, 3, 8, 8)} for batch in text(left, count)
    ]


def opt_350m():
    """Its blocks stand between two projections."""
    from transformers import OPTConfig, OPTForCausalLM

    small = {"hidden_size": 16, "num_hidden_layers": 2, "ffn_dim": 24, "num_attention_heads": 2}
    small |= {"vocab_size": VOCABULARY, "max_position_embeddings": 32, "word_embed_proj_dim": 8}
    return OPTForCausalLM(OPTConfig(**small, do_layer_norm_before=False))


def jamba():
    """Mamba and attention in turn."""
    from transformers import JambaConfig, JambaForCausalLM

    small = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24}
    small |= {"num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2}
    small |= {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4}
    small |= {"num_experts": 1, "num_experts_per_tok": 1, "mamba_d_state": 4}
    return JambaForCausalLM(JambaConfig(**small))


def albert():
    """One block, called three times."""
    from transformers import AlbertConfig, AlbertForSequenceClassification

    small = {"vocab_size": VOCABULARY, "embedding_size": 8, "hidden_size": 16}
    small |= {"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    return AlbertForSequenceClassification(AlbertConfig(**small, max_position_embeddings=16))


# attention of our own


class Attention(nn.Module):
    """Padding is not seen by anything else."""

    def __init__(self, width=8):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x, context, real=None):
        scores = self.q(x) @ self.k(context).transpose(1, 2)
        if real is not None:
            scores = scores.masked_fill(~real[:, None].bool(), -1e9)
        return x + scores.softmax(-1) @ self.v(context)


def embedded(batches, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(EXAMPLES, LENGTH, 8, generator=generator)  # noqa: E731
    return [{"inputs_embeds": draw(), "image": draw(), TEXT: batch[TEXT]} for batch in batches]


# encoders and decoders of our own


class CrossBlock(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.cross, self.up, self.down = (nn.Linear(width, width) for _ in range(3))

    def forward(self, hidden_states, context):
        x = hidden_states + torch.tanh(self.cross(context)).mean(1, keepdim=True)
        return x + self.down(torch.tanh(self.up(x)))


class SelfBlock(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.norm = nn.BatchNorm1d(LENGTH)
        self.mlp = nn.Sequential(nn.Linear(width, 12), nn.ReLU(), nn.Linear(12, width))

    def forward(self, hidden_states):
        return hidden_states + self.mlp(self.norm(hidden_states))


class Translator(nn.Module):
    """The decoder is registered first and called last; what is between them is in no block."""

    def __init__(self, blocks=2):
        super().__init__()
        torch.manual_seed(0)
        self.decoder = nn.ModuleList(CrossBlock() for _ in range(blocks))
        self.encoder = nn.ModuleList(SelfBlock() for _ in range(blocks))
        self.stem, self.bridge = nn.Linear(8, 8), nn.Linear(8, 8)
        norm = nn.BatchNorm1d(24)
        norm.running_mean.normal_()
        self.tail = nn.Sequential(nn.Linear(8, 24), norm, nn.ReLU(), nn.Linear(24, 4))

    def forward(self, x):
        x = hidden = self.stem(x)
        for block in self.encoder:
            hidden = block(hidden)
        context = self.bridge(hidden)
        for block in self.decoder:
            x = block(x, context=context)
        return self.tail(x.mean(1))


TRANSLATOR = ["encoder.0", "encoder.1", "decoder.0", "decoder.1"]


def sentences(count=3):
    generator = torch.Generator().manual_seed(1)
    return prunus.Calibration(
        [torch.randn(4, LENGTH, 8, generator=generator) for _ in range(count)]
    )


def slowly(model, blocks, outside, pruner, calibration, **arguments):
    """Block after block on the whole model, which runs anew for each, and the others last."""
    rows = []
    for layers in [*([f"{block}.*"] for block in blocks), *([outside] if outside else [])]:
        result = prunus.prune(model, pruner, layers=layers, calibration=calibration, **arguments)
        rows += result.rows
    return rows
