"""Small models of blocks in a row, people's and ours, and the slow way to prune them."""

import copy

import pytest
import torch
from torch import nn

import prunus
from prunus.core.blocks import find_blocks
from prunus.engine import step as engine
from prunus.engine.sequential import walk as block_walk

from tests.helpers.training import same, snapshot

BLOCKS = 3


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(0.5)
        self.up, self.down = nn.Linear(width, 12), nn.Linear(12, width)
        self.seen = 0

    def forward(self, hidden_states):
        self.seen += 1
        x = torch.tanh(self.up(self.norm(hidden_states)))
        return hidden_states + self.drop(self.down(x))


class Toy(nn.Module):
    """A stem, a list of blocks, and a head."""

    def __init__(self, blocks=None):
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.layers = nn.ModuleList([Block() for _ in range(BLOCKS)] if blocks is None else blocks)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class ByKeyword(Toy):
    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(hidden_states=x)
        return self.head(x)


class InATuple(Block):
    def forward(self, hidden_states):
        return (super().forward(hidden_states),)


class Tuples(Toy):
    def __init__(self):
        super().__init__([InATuple() for _ in range(BLOCKS)])

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)[0]
        return self.head(x)


class WithResidual(Block):
    def forward(self, hidden_states, residual=None):
        residual = hidden_states if residual is None else residual + hidden_states
        return self.down(torch.tanh(self.up(self.norm(residual)))), residual


class Residual(Toy):
    """The residual stream goes beside the blocks' outputs, and changes on the way."""

    def __init__(self):
        super().__init__([WithResidual() for _ in range(BLOCKS)])

    def forward(self, x):
        x, residual = self.stem(x), None
        for layer in self.layers:
            x, residual = layer(x, residual=residual)
        return self.head(x + residual)


class Named(Toy):
    """Blocks with names instead of numbers, as torchvision's."""

    def __init__(self):
        super().__init__()
        named = {f"layer_{i}": block for i, block in enumerate(self.layers)}
        self.layers = nn.Sequential()
        for name, block in named.items():
            self.layers.add_module(name, block)


class Doubling(Toy):
    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = 2 * layer(x)
        return self.head(x)


class Skipping(Toy):
    def forward(self, x):
        return self.head(self.layers[0](self.stem(x)))


class Dictionary(Block):
    def forward(self, hidden_states):
        return {"hidden": super().forward(hidden_states)}


class Dictionaries(Toy):
    def __init__(self):
        super().__init__([Dictionary() for _ in range(BLOCKS)])

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)["hidden"]
        return self.head(x)


def toy(cls=Toy):
    torch.manual_seed(0)
    return cls()


def data(*shape, count=3):
    generator = torch.Generator().manual_seed(1)
    return prunus.Calibration(
        [torch.randn(shape or (4, 5, 6), generator=generator) for _ in range(count)]
    )


def walk(model, pruner="sparsegpt", how=True, calibration=None, layers="layers.*", **arguments):
    arguments = {"sparsity": 0.5, **arguments}
    calibration = calibration or data()
    return prunus.prune(
        model, pruner, layers=layers, calibration=calibration, sequential=how, **arguments
    )


def slowly(model, pruner, calibration, **arguments):
    """Block after block on the whole model, which runs anew for each."""
    blocks = find_blocks(model)
    rows = []
    table = arguments.pop("table", None)
    for number in range(len(blocks)):
        layers = f"{blocks.name_of(number)}.*"
        if table is not None:
            inside = {n: s for n, s in table.items() if blocks.number_of(n) == number}
            arguments["allocator"] = inside
        result = prunus.prune(model, pruner, layers=layers, calibration=calibration, **arguments)
        rows += result.rows
    return rows


def check_as_the_slow_way(model, pruner, calibration, **arguments):
    slow = copy.deepcopy(model)
    arguments = arguments or {"sparsity": 0.5}
    name = find_blocks(model).name
    result = prunus.prune(
        model,
        pruner,
        layers=f"{name}.*",
        calibration=calibration,
        sequential=True,
        **arguments,
    )
    assert result.rows == slowly(slow, pruner, calibration, **arguments)
    assert same(model, snapshot(slow))
    assert list(result.masks) == [row.name + ".weight" for row in result.rows]
    for row in result.rows:
        assert torch.equal(
            result.masks[f"{row.name}.weight"], model.get_submodule(row.name).weight != 0
        )
    return result


# what stays as it was


def forwards(model):
    return [module for module in model.modules() if "forward" in module.__dict__]


def meta(model):
    return copy.deepcopy(model).to("meta")


def saved(model, folder):
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    return str(folder)


# models that people have


def fail_at(monkeypatch, number):
    """Interrupt the pruning of one block; returns the names of the blocks that were begun."""
    begun = []

    def step(method, layers, *rest):
        begun.append(layers[0].name.split(".")[-2])
        if begun[-1] == str(number):
            raise KeyboardInterrupt
        return engine.prune_step(method, layers, *rest)

    monkeypatch.setattr(block_walk, "prune_step", step)
    return begun


VOCABULARY = 40

SIZE = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": BLOCKS}

DECODER = {
    **SIZE,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama(**settings):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**DECODER, **settings))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=16,
            n_embd=16,
            n_layer=BLOCKS,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def opt():
    from transformers import OPTConfig, OPTForCausalLM

    small = {"ffn_dim": 24, "num_attention_heads": 2, "word_embed_proj_dim": 16}
    return OPTForCausalLM(OPTConfig(**SIZE, **small, max_position_embeddings=32))


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    small = {"num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 16}
    return BertForSequenceClassification(BertConfig(**SIZE, **small))


def t5_encoder():
    from transformers import T5Config, T5EncoderModel

    small = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": BLOCKS, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=VOCABULARY, **small))


def gemma3():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return Gemma3ForCausalLM(
        Gemma3TextConfig(**DECODER, head_dim=4, sliding_window=4, layer_types=kinds)
    )


def qwen2():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    return Qwen2ForCausalLM(Qwen2Config(**DECODER, **window))


FAMILIES = {
    llama: "model.layers",
    gpt2: "transformer.h",
    opt: "model.decoder.layers",
    bert: "bert.encoder.layer",
    t5_encoder: "encoder.block",
    gemma3: "model.layers",
    qwen2: "model.layers",
}


def tokens(padded=False, count=2):
    generator = torch.Generator().manual_seed(3)
    batches = []
    for _ in range(count):
        batch = {"input_ids": torch.randint(2, VOCABULARY, (2, 7), generator=generator)}
        if padded:
            batch["attention_mask"] = torch.ones(2, 7, dtype=torch.int64)
            batch["attention_mask"][1, 4:] = 0
        batches.append(batch)
    return prunus.Calibration(batches)


def family(make, **settings):
    transformers = pytest.importorskip("transformers")
    transformers.set_seed(0)
    try:
        return make(**settings)
    except ImportError:
        pytest.skip("this version of transformers has no such model")
