"""Padding is left out of the tokens that a mask is of, and of no others, on models people have."""

import copy
import logging

import pytest
import torch
from torch import nn

import prunus
from prunus.calibration.input_pass import measure_inputs
from prunus.core.layers import all_layers
from prunus.stats import InputGram

from tests.helpers import towers
from tests.helpers.blocks import bert, family, gpt2, llama, opt
from tests.helpers.towers import DECODER, EXAMPLES, LENGTH, TEXT, Attention, embedded, ids, mask
from tests.oracles.layerwise import gram

# transformers' progress bars
pytestmark = pytest.mark.filterwarnings("ignore:IProgress not found")


def inputs_of(model, batches):
    """For each layer what it was given, batch by batch, call by call."""
    seen = {}

    def hook(layer, number):
        def keep(module, args, kwargs):
            x = (*args, *kwargs.values())[0]
            seen.setdefault(layer.name, []).append((number, x.detach().double()))

        return keep

    for number, batch in enumerate(batches):
        handles = [
            layer.module.register_forward_pre_hook(hook(layer, number), with_kwargs=True)
            for layer in all_layers(model)
        ]
        with torch.no_grad():
            model.eval()(**batch)
        for handle in handles:
            handle.remove()
    return seen


def measured(model, batches):
    layers = [x for x in all_layers(model) if x.reads_arguments and not x.no_inputs()]
    empty = {x: InputGram(x.matrix_shape()[1], dtype=torch.float64) for x in layers}
    stats, unreached = measure_inputs(model, empty, prunus.Calibration(batches))
    return {layer.name: stat for layer, stat in stats.items() if layer not in unreached}


def real_rows(x, mask):
    """The rows of real tokens one by one, of all tokens of one example after the other."""
    x = x.reshape(*mask.shape, -1)
    rows = [x[b, t] for b in range(len(mask)) for t in range(mask.shape[1]) if mask[b, t]]
    return torch.stack(rows)


def check(model, batches, key_of):
    """Statistics are sums over real tokens; `key_of(name)` is the key of a layer's mask."""
    model = model.double()
    batches = [
        {key: x.double() if x.is_floating_point() else x for key, x in batch.items()}
        for batch in batches
    ]
    stats = measured(model, batches)
    for name, calls in inputs_of(model, batches).items():
        if isinstance(model.get_submodule(name), nn.Conv1d | nn.Conv2d):
            continue
        key = key_of(name)
        rows = [
            x.reshape(-1, x.shape[-1])
            if key is None or key not in batches[i]
            else real_rows(x, batches[i][key])
            for i, x in calls
        ]
        assert stats[name].count == sum(map(len, rows)), name
        torch.testing.assert_close(stats[name].gram("cpu"), gram(torch.cat(rows)))


def of_translation(name):
    """Keys and values of cross-attention are the encoder's tokens in the midst of the decoder."""
    cross = "EncDecAttention" in name or "encoder_attn" in name
    if cross and name.rpartition(".")[2] in ("k", "v", "k_proj", "v_proj"):
        return TEXT
    return TEXT if name.removeprefix("model.").startswith("encoder.") else DECODER


def of_speech(name):
    return None if of_translation(name) == TEXT else DECODER


def of_captions(name):
    return TEXT if name.startswith("text_model.") else None


def of_text(name):
    return None if "pooler" in name or name == "classifier" else TEXT


MODELS = {
    towers.t5: (towers.translations, of_translation),
    towers.bart: (towers.translations, of_translation),
    towers.pegasus: (towers.translations, of_translation),
    towers.marian: (towers.translations, of_translation),
    towers.whisper: (towers.speech, of_speech),
    towers.clip: (towers.captions, of_captions),
    towers.vilt: (towers.pictures, lambda name: None),
    llama: (towers.text, of_text),
    gpt2: (towers.text, of_text),
    opt: (towers.text, of_text),
    bert: (towers.text, of_text),
}


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_each_mask_is_laid_over_its_own_tokens(make, left):
    batches, key_of = MODELS[make]
    torch.manual_seed(0)
    check(family(make), batches(left), key_of)


def test_one_mask_of_two_says_nothing_of_the_other_sequence():
    for absent in (TEXT, DECODER):
        batches = towers.translations()
        for batch in batches:
            del batch[absent]
        check(family(towers.t5), batches, of_translation)


def test_what_a_decoder_makes_of_the_encoders_tokens_has_no_mask():
    """BART decodes the input itself, shifted by a token, if it is given nothing else."""
    check(family(towers.bart), towers.text(), lambda n: TEXT if of_translation(n) == TEXT else None)


def test_labels_are_the_decoders_tokens_or_the_models_own():
    labels = [{**x, "labels": x["input_ids"]} for x in towers.text()]
    check(family(llama), labels, of_text)
    translations = towers.translations()
    for batch in translations:
        batch["labels"] = batch.pop("decoder_input_ids")
    check(family(towers.t5), translations, of_translation)


def test_what_a_first_batch_does_not_show_is_seen_in_a_later_one():
    text, both = towers.text()[0], towers.translations(count=2)
    start = ids(20)
    plain = {"input_ids": ids(21), "decoder_input_ids": start}
    masked = {**text, "decoder_input_ids": start}
    other = {**both[1], "decoder_input_ids": ids(9)[:, :4], DECODER: mask((4, 3))[:, :4]}
    check(family(towers.t5), [plain, masked, both[0], other, plain], of_translation)


# towers of our own


class Pair(nn.Module):
    """Two inputs of the same shape, of which one has a mask."""

    def __init__(self, fixed=False):
        super().__init__()
        torch.manual_seed(0)
        self.places = nn.Parameter(torch.randn(LENGTH, 8)) if fixed else 0
        self.words, self.patches, self.cross = Attention(), Attention(), Attention()

    def forward(self, inputs_embeds, image, attention_mask=None):
        words = inputs_embeds + self.places
        words = self.words(words, words, attention_mask)
        image = self.patches(image, image)
        return self.cross(image, words, attention_mask)


def of_pair(name):
    return TEXT if name.startswith("words") or name in ("cross.k", "cross.v") else None


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("fixed", [False, True], ids=["any length", "one length"])
def test_patches_as_many_as_words_keep_all_rows(fixed, left, caplog):
    check(Pair(fixed), embedded(towers.text(left)), of_pair)
    assert not caplog.records


class TokensFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.flat = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, inputs_embeds, attention_mask):
        x = inputs_embeds.transpose(0, 1)
        return self.body(x), self.flat(x.flatten(0, 1))


@pytest.mark.parametrize("examples", [2, LENGTH], ids=["", "as many examples as tokens"])
def test_tokens_may_come_before_examples(examples):
    torch.manual_seed(0)
    x = torch.randn(examples, LENGTH, 8, dtype=torch.float64)
    real = mask([LENGTH - 1 - i % 3 for i in range(examples)])
    model = TokensFirst().double()
    stats = measured(model, [{"inputs_embeds": x, TEXT: real}])
    for name in ("body", "flat"):
        torch.testing.assert_close(stats[name].gram("cpu"), gram(real_rows(x, real)))


class Prefix(nn.Module):
    """Two tokens before those of the batch, which then are pooled in pairs."""

    def __init__(self):
        super().__init__()
        self.extra = nn.Parameter(torch.randn(1, 2, 8))
        self.plain, self.layers = nn.Linear(8, 8), nn.ModuleList(nn.Linear(8, 8) for _ in range(5))

    def forward(self, inputs_embeds, attention_mask):
        x = self.plain(inputs_embeds)
        x = torch.cat([self.extra.expand(len(x), 2, 8), x], 1)
        for layer in self.layers:
            x = layer(x)
        return x


def test_padding_that_cannot_be_told_counts_and_one_line_says_so(caplog):
    batches = [{k: x for k, x in b.items() if k != "image"} for b in embedded(towers.text())]
    with caplog.at_level(logging.WARNING, "prunus"):
        stats = measured(Prefix(), batches)
    assert stats["plain"].count == sum(int(batch[TEXT].sum()) for batch in batches)
    assert {stats[f"layers.{i}"].count for i in range(5)} == {2 * EXAMPLES * (LENGTH + 2)}
    (record,) = caplog.records
    assert "padding counts in the statistics of layers.*: it is not known" in record.message


class Routed(nn.Module):
    """Each expert gets the tokens whose first feature has its sign."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, inputs_embeds, attention_mask):
        flat = inputs_embeds.flatten(0, 1)
        first = flat[:, 0] > 0
        return self.experts[0](flat[first]).sum() + self.experts[1](flat[~first]).sum()


def test_the_log_says_once_of_the_same_data_where_padding_counts(caplog):
    batches = [{k: x for k, x in b.items() if k != "image"} for b in embedded(towers.text())]
    data, model = prunus.Calibration(batches), Routed()
    layers = list(all_layers(model))
    for _ in range(2):
        measure_inputs(model, {layer: InputGram(8) for layer in layers}, data)
    assert len(caplog.records) == 1


def test_experts_count_all_that_they_are_sent(caplog):
    batches = [{k: x for k, x in b.items() if k != "image"} for b in embedded(towers.text())]
    sent = [int((b["inputs_embeds"][..., 0] > 0).sum()) for b in batches]
    stats = measured(Routed(), batches)
    assert stats["experts.0"].count == sum(sent)
    assert stats["experts.1"].count == 2 * EXAMPLES * LENGTH - sum(sent)
    assert "experts.*" in caplog.text


def test_what_one_mask_does_not_tell_another_may(caplog):
    """The encoder takes all of its tokens only, and cannot say which of them are padding."""
    model, batches = family(towers.t5), towers.translations()

    def whole(module, args, kwargs):
        ids = kwargs["input_ids"]
        if ids.shape[1] != LENGTH or not any(torch.equal(ids, b["input_ids"]) for b in batches):
            raise ValueError("other tokens")

    model.encoder.register_forward_pre_hook(whole, with_kwargs=True)
    check(model, batches, lambda name: DECODER if of_translation(name) == DECODER else None)
    assert "encoder.block" in caplog.text
    assert "lm_head" not in caplog.text
    assert "decoder.block.*.layer.*.SelfAttention" not in caplog.text


def test_inputs_of_which_none_is_known_to_be_the_masks_keep_all_rows(caplog):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, a, b, attention_mask):
            return self.first(a) + self.second(b)

    batch = embedded(towers.text(count=1))[0]
    two = {"a": batch["inputs_embeds"], "b": batch["image"], TEXT: batch[TEXT]}
    stats = measured(Two(), [two])
    assert {stat.count for stat in stats.values()} == {EXAMPLES * LENGTH}
    assert "first, second" in caplog.text


def test_masks_of_something_else_are_no_padding():
    batches = [
        {**x, "global_attention_mask": torch.eye(LENGTH, dtype=torch.int64)[:EXAMPLES]}
        for x in towers.text()
    ]

    class Global(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.body = nn.Embedding(40, 8), nn.Linear(8, 8)

        def forward(self, input_ids, attention_mask, global_attention_mask):
            return self.body(self.embed(input_ids) * global_attention_mask[..., None])

    check(Global(), batches, of_text)


def test_an_encoder_called_for_two_texts_knows_them_apart():
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.body = nn.Embedding(40, 8), nn.Linear(8, 8)

        def forward(self, input_ids_a, attention_mask_a, input_ids_b, attention_mask_b):
            return self.body(self.embed(input_ids_a)).mean() - self.body(self.embed(input_ids_b))

    first, second = mask((6, 2)), mask((3, 5))
    batch = {"input_ids_a": ids(0), "attention_mask_a": first}
    batch |= {"input_ids_b": ids(1), "attention_mask_b": second}
    model = Siamese().double()
    embed = model.embed.weight.detach()
    rows = [real_rows(embed[ids(0)], first), real_rows(embed[ids(1)], second)]
    stats = measured(model, [batch])
    assert stats["body"].count == 16
    torch.testing.assert_close(stats["body"].gram("cpu"), gram(torch.cat(rows)))


def test_random_numbers_are_what_they_were_without_padding():
    def forward(model, batch):
        noise = torch.randn(EXAMPLES, LENGTH, 8, dtype=torch.float64)
        width = batch["inputs_embeds"].shape[1]
        return model(batch["inputs_embeds"] + noise[:, :width])

    x = embedded(towers.text())
    seen = []
    for masked in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8, bias=False)).double()
        model[0].register_forward_pre_hook(lambda module, args: seen[-1].append(args[0]))
        seen.append([])
        batches = [b if masked else {"inputs_embeds": b["inputs_embeds"]} for b in x]
        layer = next(iter(all_layers(model)))
        stats = {layer: InputGram(8, dtype=torch.float64)}
        measure_inputs(model, stats, prunus.Calibration(batches, forward=forward))
    whole = [y for y in seen[0] if y.shape[1] == LENGTH]
    assert all(torch.equal(a, b) for a, b in zip(whole, seen[1], strict=True))


@pytest.mark.parametrize("encoded", [False, True], ids=["dictionary", "BatchEncoding"])
def test_a_batch_is_not_changed_by_what_is_tried_with_it(encoded):
    from transformers import BatchEncoding

    model, batches = family(towers.t5).double(), towers.translations()
    before = copy.deepcopy(batches)
    batches = [BatchEncoding(batch) for batch in batches] if encoded else batches
    stats = measured(model, batches)
    assert stats["encoder.block.0.layer.0.SelfAttention.q"].count == sum(
        int(batch[TEXT].sum()) for batch in before
    )
    for a, b in zip(batches, before, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


class AllExperts(nn.Module):
    """Every expert gets every token: those that put it first, and then the others."""

    def __init__(self, name):
        super().__init__()
        torch.manual_seed(0)
        self.name = name
        setattr(self, name, nn.ModuleList(nn.Linear(8, 8) for _ in range(2)))
        self.shared = nn.Linear(8, 8)

    def forward(self, inputs_embeds, attention_mask):
        flat = inputs_embeds.flatten(0, 1)
        first = flat[:, 0] > 0
        for expert, mine in zip(getattr(self, self.name), (first, ~first), strict=True):
            expert(torch.cat([flat[mine], flat[~mine]]))
        return self.shared(flat)


@pytest.mark.parametrize("name", ["experts", "parts"])
@pytest.mark.parametrize("sorted_first", [False, True], ids=["", "in order in the first batch"])
def test_as_many_rows_as_tokens_may_be_in_another_order(name, sorted_first, caplog):
    batches = [{k: x for k, x in b.items() if k != "image"} for b in embedded(towers.text())]
    if sorted_first and name == "experts":
        batches[0]["inputs_embeds"][..., 0].abs_()
    model = AllExperts(name)
    stats = measured(
        model.double(), [{**b, "inputs_embeds": b["inputs_embeds"].double()} for b in batches]
    )
    real = torch.cat([real_rows(b["inputs_embeds"], b[TEXT]) for b in batches]).double()
    torch.testing.assert_close(stats["shared"].gram("cpu"), gram(real))
    everything = torch.cat([b["inputs_embeds"].flatten(0, 1) for b in batches]).double()
    for i in range(2):
        torch.testing.assert_close(stats[f"{name}.{i}"].gram("cpu"), gram(everything))
    assert f"{name}.*" in caplog.text
