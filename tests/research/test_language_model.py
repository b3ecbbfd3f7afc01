"""The built-in language model of the research programs, at a size that trains in a second."""

import math
import os
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, AutoTokenizer

import prunus

from research.common import language_model as lm

TINY = {
    "steps": 30,
    "seqlen": 32,
    "lr": 1e-2,
    "limit_bytes": 60_000,
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "layers": 1,
    "heads": 2,
    "key_value_heads": 1,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder, and the model, tokenizer and held-out text from it."""
    folder = tmp_path_factory.mktemp("runs") / "model"
    model, tokenizer = lm.train(folder, **TINY)
    return folder, model, tokenizer, lm.load_text(str(folder / lm.HELD_OUT))


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A standard library of a few files."""
    files = {
        "os.py": "import nothing\n",
        "a/b.py": "# äöü\n",
        "a/notes.txt": "not a program\n",
        "site-packages/c.py": "of = 'somebody else'\n",
        "a/test/d.py": "assert True\n",
        "encodings/e.py": "table = 1, 2, 3\n",
    }
    for name, source in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source, encoding="utf-8")
    monkeypatch.setattr(os, "__file__", str(tmp_path / "os.py"))
    monkeypatch.setattr(lm, "topics", {"lambda": "\nOf functions.\n"})
    lm.python_text.cache_clear()
    yield
    lm.python_text.cache_clear()


def slow_perplexity(model, ids, seqlen):
    """Token by token, each predicted from those before it in its window."""
    losses = []
    with torch.no_grad():
        for begin in range(0, len(ids) - seqlen + 1, seqlen):
            for end in range(begin + 1, begin + seqlen):
                logits = model(input_ids=torch.tensor([ids[begin:end]])).logits[0, -1].double()
                losses.append(-float(logits.log_softmax(0)[ids[end]]))
    return math.exp(sum(losses) / len(losses))


def test_the_text_is_the_topics_and_programs_of_the_library_alone(library):
    parts = lm.python_text().split("\n\n")
    assert sorted(map(str.strip, parts)) == ["", "# äöü", "Of functions.", "import nothing"]


@pytest.mark.parametrize("limit", [0, 1, 20, 1000])
def test_the_text_ends_at_its_limit(library, limit):
    whole = lm.python_text().encode()
    assert lm.python_text(limit) == whole[:limit].decode(errors="ignore")


def test_this_python_has_text_to_the_limit():
    assert 59_990 < len(lm.python_text(60_000).encode()) <= 60_000


def test_the_splits_are_the_text_cut_in_two():
    text = "".join(map(chr, range(97, 197)))
    train, test = lm.split_text(text, "train"), lm.split_text(text, "test")
    assert (train + test, len(test)) == (text, 5)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=50))
@settings(deadline=None, max_examples=50)
def test_the_tokenizer_encodes_any_text_and_back(trained, text):
    tokenizer = trained[2]
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert all(0 < i < 300 for i in ids)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(trained):
    *_, tokenizer, text = trained
    model = lm.build(lm.Settings(**TINY))
    torch.nn.init.zeros_(model.lm_head.weight)
    assert lm.perplexity(model, tokenizer, text, 32) == pytest.approx(300, rel=1e-6)


@given(st.integers(2, 20), st.integers(1, 9), st.integers(0, 60))
@settings(deadline=None, max_examples=10)
def test_perplexity_is_that_of_tokens_predicted_one_by_one(trained, seqlen, batch_size, extra):
    model, tokenizer, text = trained[1], trained[2], trained[3][: 40 + extra]
    mine = lm.perplexity(model, tokenizer, text, seqlen, batch_size)
    theirs = slow_perplexity(model, tokenizer(text)["input_ids"], seqlen)
    assert mine == pytest.approx(theirs, rel=1e-4)


def test_perplexity_of_a_ruined_model_is_infinite_not_an_error(trained):
    *_, tokenizer, text = trained
    model = lm.build(lm.Settings(**TINY))
    model.lm_head.weight.data *= 1e6
    assert lm.perplexity(model, tokenizer, text, 32) == math.inf


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_batches_are_windows_of_the_text_and_depend_on_the_seed(trained, n, seqlen, seed):
    *_, tokenizer, text = trained
    text = text[:300]
    ids = tokenizer(text)["input_ids"]
    windows = [ids[k : k + seqlen] for k in range(len(ids) - seqlen + 1)]
    batches = lm.batches(tokenizer, text, n, seqlen, seed)
    again = lm.batches(tokenizer, text, n, seqlen, seed)
    assert len(batches) == n
    for batch, same in zip(batches, again, strict=True):
        assert batch.keys() == {"input_ids"}
        assert batch["input_ids"].shape == (1, seqlen)
        assert batch["input_ids"][0].tolist() in windows
        assert torch.equal(batch["input_ids"], same["input_ids"])


def test_every_window_can_be_drawn_and_other_seeds_draw_others():
    ids = torch.arange(5)
    one, other = (
        lm.random_windows(ids, 200, 3, torch.Generator().manual_seed(seed)).tolist()
        for seed in (0, 1)
    )
    assert sorted(set(map(tuple, one))) == [(0, 1, 2), (1, 2, 3), (2, 3, 4)]
    assert one != other


def test_batches_calibrate_a_pruner(trained):
    folder, _, tokenizer, text = trained
    model = AutoModelForCausalLM.from_pretrained(folder)
    calibration = prunus.Calibration(lm.batches(tokenizer, text, 4, 16))
    result = prunus.prune(model, "wanda", sparsity=0.5, calibration=calibration)
    assert result.sparsity == pytest.approx(0.5, abs=0.01)


def test_training_lowers_the_perplexity_of_text_it_has_not_seen(trained):
    _, model, tokenizer, text = trained
    before = lm.perplexity(lm.build(lm.Settings(**TINY)), tokenizer, text, 32)
    assert lm.perplexity(model, tokenizer, text, 32) < before / 2


def test_a_folder_is_read_by_transformers_and_gives_the_same_logits(trained):
    folder, model, tokenizer, text = trained
    again = AutoModelForCausalLM.from_pretrained(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.eos_token == lm.EOS
    assert theirs(text)["input_ids"] == tokenizer(text)["input_ids"]
    ids = lm.batches(theirs, text, 1, 32)[0]["input_ids"]
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_folder_that_has_the_model_is_not_trained_again(trained, monkeypatch):
    folder, model, tokenizer, _ = trained
    monkeypatch.delattr(lm, "fit")
    again, theirs = lm.train(folder, **TINY)
    assert theirs.get_vocab() == tokenizer.get_vocab()
    for mine, other in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_the_same_settings_give_the_same_weights_and_leave_the_generator_alone(trained, tmp_path):
    model = trained[1]
    before = torch.get_rng_state()
    again, _ = lm.train(tmp_path, **TINY)
    assert torch.equal(torch.get_rng_state(), before)
    for mine, other in zip(again.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


def test_a_folder_with_something_else_is_refused_and_left_alone(trained, tmp_path):
    folder = trained[0]
    with pytest.raises(ValueError, match="use another, or delete it"):
        lm.train(folder, **TINY | {"seed": 1})
    (tmp_path / "thesis.txt").write_text("words")
    with pytest.raises(ValueError, match="folder=.* is not empty"):
        lm.train(tmp_path, **TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_errors_name_the_argument_and_the_remedy(trained):
    _, model, tokenizer, text = trained
    for call, message in (
        (lambda: lm.split_text(text, "dev"), "split='dev'; use 'train' or 'test'"),
        (lambda: lm.train_tokenizer(text, 256), "vocab_size=256; use at least 257"),
        (lambda: lm.batches(tokenizer, "few", 1, 99), "seqlen=99, .* pass a longer text"),
        (lambda: lm.perplexity(model, tokenizer, "few", 99), "seqlen=99, .* pass a longer text"),
        (lambda: lm.perplexity(model, tokenizer, text, 1), "seqlen=1 .* use at least 2"),
        (lambda: lm.load_text("nowhere"), "name='nowhere' .* pass a text file"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_rows_of_a_data_set_are_joined_by_empty_lines(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return {"text": ["one", "two"]}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert lm.load_text("wikitext/wikitext-2-raw-v1", "test") == "one\n\ntwo"
    assert lm.load_text("roneneldan/TinyStories/default", "train") == "one\n\ntwo"
    assert asked == [
        (("wikitext", "wikitext-2-raw-v1"), {"split": "test"}),
        (("roneneldan/TinyStories", "default"), {"split": "train"}),
    ]


def test_a_data_set_out_of_reach_says_what_to_do(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ValueError, match="fetched .no route.; .* or pass a text file, 'python'"):
        lm.load_text("wikitext/wikitext-2-raw-v1")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        lm.load_text("wikitext/wikitext-2-raw-v1")
