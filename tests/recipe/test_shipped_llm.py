"""Recipes for transformers do what they say, in small models of every architecture they are for."""

import re

import pytest
import torch
import transformers as hf
from timm.models import VisionTransformer
from timm.models.deit import VisionTransformerDistilled
from torch import nn
from transformers.pytorch_utils import Conv1D

import prunus

from tests.oracles.pruning import ROOT

RECIPES = ROOT / "recipes"
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 40,
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GROUPED = {**TEXT, "num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 16}
OPT = {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 40, "n_positions": 16}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 1}
BERT = {**TEXT, "type_vocab_size": 2}
ELECTRA = {**BERT, "embedding_size": 32}
VIT = {"img_size": 8, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}

# family: its models
MODELS = {
    "llama": {
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
        "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, sliding_window=4)),
        "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**HEADS)),
        "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**HEADS, sliding_window=4)),
        "classifier": lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**GROUPED)),
    },
    "qwen": {
        "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED)),
        "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**HEADS)),
    },
    "opt": {"opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**OPT))},
    "gpt2": {"gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2))},
    "bert": {
        "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**BERT)),
        "classifier": lambda: hf.BertForSequenceClassification(hf.BertConfig(**BERT)),
        "backbone": lambda: hf.BertModel(hf.BertConfig(**BERT)),
        "roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**BERT)),
        "electra": lambda: hf.ElectraForMaskedLM(hf.ElectraConfig(**ELECTRA)),
    },
    "vit": {
        "vit": lambda: VisionTransformer(**VIT, num_classes=3),
        "distilled": lambda: VisionTransformerDistilled(**VIT, num_classes=3),
    },
}
# what stays dense in any of them
DENSE = (
    r"lm_head.*|score|cls\..*|classifier|(.*\.)?pooler\.dense|generator_.*|patch_embed\.proj|head.*"
)
NEW_OF_VIT = {"ria-2of4", "sparsegpt-50"}
CASES = [
    pytest.param(path, make, id=f"{family}-{path.stem}-{name}")
    for family, models in MODELS.items()
    for path in sorted((RECIPES / family).glob("*.yaml"))
    if family != "vit" or path.stem in NEW_OF_VIT
    for name, make in models.items()
]
PERMUTING = [case for case in CASES if "permute:" in case.values[0].read_text()]
# models whose residual stream stays as it is, and why
NO_STREAM = {
    "backbone": "residual stream: the output changed",  # it ends in the stream
    "roberta": "the part that lm_head.bias",
    "electra": "the part that generator_predictions.dense.weight",
}


def built(make):
    """The model, nothing in it zero or one, and data to calibrate on."""
    model = make().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    if isinstance(model, VisionTransformer):
        return model, prunus.Calibration([torch.randn(4, 3, 8, 8) for _ in range(3)])
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, 8:] = 0
    ids = [torch.randint(2, 40, (2, 12)) for _ in range(3)]
    return model, prunus.Calibration([{"input_ids": i, "attention_mask": mask} for i in ids])


def prunable(model):
    """Matrices (outputs, inputs) of all linear layers and convolutions, as they are stored."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            found[name] = module.weight.detach().T
        elif isinstance(module, nn.Linear | nn.Conv2d):
            found[name] = module.weight.detach().flatten(1)
    return found


def zeros(t):
    return t.numel() - int(t.count_nonzero())


def keeps(matrix, n, m):
    """Does every row keep exactly n of every m consecutive inputs?"""
    rows = matrix.tolist()
    groups = [row[i : i + m] for row in rows for i in range(0, len(row), m)]
    return all(len(group) == m and sum(x != 0 for x in group) == n for group in groups)


def assert_meets(modifier, pruned):
    if ":" in modifier.pattern:
        assert all(keeps(matrix, *map(int, modifier.pattern.split(":"))) for matrix in pruned)
    elif modifier.pattern == "row":
        for matrix in pruned:
            assert {zeros(row) for row in matrix} == {round(modifier.sparsity * matrix.shape[1])}
    else:
        total = sum(m.numel() for m in pruned)
        assert sum(map(zeros, pruned)) == round(modifier.sparsity * total)
    if modifier.allocator is not None and modifier.allocator.name == "uniform":
        assert all(abs(zeros(m) - modifier.sparsity * m.numel()) < 1 for m in pruned)


@pytest.mark.parametrize(("path", "make"), CASES)
def test_every_recipe_prunes_all_of_the_model_but_its_ends_and_exactly(path, make, caplog):
    model, calibration = built(make)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = prunus.prune(model, path, calibration=calibration)
    (modifier,) = result.recipe.modifiers
    layers = prunable(model)
    pruned = {name for name in layers if not re.fullmatch(DENSE, name)}
    assert pruned == {row.name for row in result.rows}
    assert_meets(modifier, [layers[name] for name in pruned])
    for name, p in model.named_parameters():
        if name.removesuffix(".weight") not in pruned:
            old, new = before[name].flatten(), p.detach().flatten()
            if modifier.permute is not None:  # others may have moved, no more than that
                old, new = old.sort().values, new.sort().values
            assert torch.equal(old, new), name
    assert "matches nothing" not in caplog.text


@pytest.mark.parametrize(("path", "make"), PERMUTING)
def test_input_channels_are_regrouped_in_every_layer_or_the_reason_is_given(path, make, request):
    model, calibration = built(make)
    result = prunus.prune(model, path, calibration=calibration)
    name = request.node.callspec.id.rpartition("-")[2]
    small = "no other order keeps more of the score"
    refused = {n: why for n, why in result.not_permuted.items() if why != small}
    assert all(why.startswith(NO_STREAM[name]) for why in refused.values())
    assert bool(refused) == (name in NO_STREAM)
    assert {row.kind for row in result.permuted} >= {"mlp", "attention"}
    assert any(row.kind == "residual" for row in result.permuted) == (name not in NO_STREAM)
    assert all(row.after > row.before for row in result.permuted)


@pytest.mark.parametrize(
    "path", sorted({p.values[0] for p in CASES}), ids=lambda p: f"{p.parent.name}-{p.stem}"
)
def test_a_sparsity_can_be_overridden(path):
    (modifier,) = prunus.Recipe.load(path).modifiers
    if modifier.sparsity is not None:
        (other,) = prunus.Recipe.load(path, sparsity=0.25).modifiers
        assert other.sparsity == 0.25
    else:
        assert modifier.pattern == "2:4"
