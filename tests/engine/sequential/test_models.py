"""Models that people have, pruned block by block."""

import copy

import pytest
import torch

import prunus
from prunus.core.blocks import find_blocks

from tests.helpers.blocks import (
    BLOCKS,
    FAMILIES,
    VOCABULARY,
    check_as_the_slow_way,
    data,
    family,
    forwards,
    llama,
    tokens,
    walk,
)
from tests.helpers.training import snapshot

# transformers' progress bars
pytestmark = pytest.mark.filterwarnings("ignore:IProgress not found")


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("make", FAMILIES, ids=lambda make: make.__name__)
def test_language_models_are_pruned_as_the_slow_way_does(make, padded):
    model = family(make)
    assert find_blocks(model).name == FAMILIES[make]
    result = check_as_the_slow_way(model, "sparsegpt", tokens(padded))
    assert result.sparsity == 0.5


def test_vision_transformers_are_pruned_as_the_slow_way_does():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(
        img_size=16,
        patch_size=8,
        embed_dim=16,
        depth=BLOCKS,
        num_heads=2,
        num_classes=4,
        drop_path_rate=0.1,
        init_values=1e-2,
    ).train()
    assert find_blocks(model).name == "blocks"
    check_as_the_slow_way(model, "sparsegpt", data(2, 3, 16, 16))
    assert model.training


def test_padding_does_not_count_in_later_blocks_either():
    model = family(llama)
    padded, real = tokens(padded=True), []
    for batch in padded.batches:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        real += [{"input_ids": row[m.bool()][None]} for row, m in zip(ids, mask, strict=True)]
    short = copy.deepcopy(model)
    walk(model.double(), layers=None, calibration=padded)
    walk(short.double(), layers=None, calibration=prunus.Calibration(real))
    for a, b in zip(model.parameters(), short.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_a_language_models_head_and_embeddings_stay_and_the_cache_setting_too():
    model = family(llama)
    before = snapshot(model)
    assert model.config.use_cache
    result = walk(model, layers=None, calibration=tokens())
    assert model.config.use_cache
    assert result.left_dense == ["lm_head"]
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(model.get_parameter(name), before[name])


def test_the_cache_setting_comes_back_after_an_error():
    model = family(llama)
    bad = prunus.Calibration([{"input_ids": torch.tensor([[VOCABULARY + 5]])}])
    with pytest.raises(IndexError):
        walk(model, layers=None, calibration=bad)
    assert model.config.use_cache
    assert forwards(model) == []
