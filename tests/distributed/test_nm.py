"""N:M training on two processes over gloo, against one process that sees all the data."""

import pytest
import torch

from tests.distributed.nm_workers import evaluations, refusal, refused_third, train_third
from tests.distributed.workers import train

RECIPE = """
modifiers:
  - nm_training:
      pattern: {pattern}
      layers: {layers}
      masking: {masking}
      structure: {structure}
      window: {{from: 1step, to: 6step}}
"""
ROWS = "[conv, wide, odd, single]"


def recipe(masking="sr_ste", pattern="2:4", layers=ROWS, structure="[3:4, 2:4]"):
    return RECIPE.format(masking=masking, pattern=pattern, layers=layers, structure=structure)


RECIPES = {
    "ste": recipe("ste"),
    "sr_ste": recipe(),
    "mdgf": recipe("{name: mdgf, decay: cosine}"),
    "outputs": recipe("mdgf", "1:4 along outputs", "[conv, wide]", "stepwise"),
    "geometric": recipe("mdgf", "1:2", "[wide, odd]", "geometric"),
}


def assert_same(mine, theirs):
    assert mine["masks"].keys() == theirs["masks"].keys()
    for name, mask in theirs["masks"].items():
        assert torch.equal(mine["masks"][name], mask), name
    for name, weight in theirs["weights"].items():
        torch.testing.assert_close(mine["weights"][name], weight, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("how", ["ddp", "fsdp", "hsdp"])
@pytest.mark.parametrize("name", RECIPES)
def test_two_ranks_train_as_one_process_does(ranks, name, how):
    one = train("plain", RECIPES[name])
    pruned = [weight == 0 for n, weight in one["weights"].items() if n in one["masks"]]
    assert all(zeros.any() for zeros in pruned)
    for answer in ranks(train, how, RECIPES[name]):
        assert_same(answer, one)


@pytest.mark.parametrize("at", [1, 4, 7])
@pytest.mark.parametrize(("first", "then"), [("fsdp", "fsdp"), ("ddp", "fsdp"), ("fsdp", "ddp")])
def test_a_state_saved_on_two_ranks_resumes_however_the_weights_lie(ranks, first, then, at):
    whole = ranks(train, then, RECIPES["mdgf"])[0]
    saved = ranks(train, first, RECIPES["mdgf"], "adam", None, at)[0]["saved"]
    for answer in ranks(train, then, RECIPES["mdgf"], "adam", saved):
        assert_same(answer, whole)
    assert_same(train("plain", RECIPES["mdgf"], "adam", saved), whole)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_ranks_evaluate_with_hard_masks_and_train_with_soft_ones(ranks, how):
    one = evaluations("plain", RECIPES["mdgf"])
    hard, soft = one["outputs"][6], one["outputs"][7]
    assert not torch.allclose(hard, soft)
    for answer in ranks(evaluations, how, RECIPES["mdgf"]):
        for mine, theirs in zip(answer["outputs"], one["outputs"], strict=True):
            torch.testing.assert_close(mine, theirs[: len(mine)], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(answer["weight"], one["weight"], rtol=1e-10, atol=1e-10)


THIRD = recipe(layers='["qkv[k]"]')


def test_a_third_of_a_replicated_weight_trains_as_on_one_process(ranks):
    one = train_third("plain", THIRD)
    assert ((one["qkv.weight"][8:16] == 0).sum(1) == 4).all()
    assert (one["qkv.weight"][:8] != 0).all()
    for answer in ranks(train_third, "ddp", THIRD):
        for name, t in one.items():
            torch.testing.assert_close(answer[name], t, rtol=1e-10, atol=1e-10)


def test_what_shards_cannot_hold_is_refused_on_every_rank(ranks):
    for said in ranks(refused_third, THIRD):
        assert "the weight is sharded, and a shard is no third; prune the whole layer" in said
    along = recipe(pattern="2:8 along outputs", layers="[conv]", structure="[2:8]")
    for said in ranks(refusal, along):
        assert "conv, cut over 2 ranks: pattern 2:8 along outputs does not divide 4 outputs" in said
