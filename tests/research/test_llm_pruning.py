"""The program that prunes language models, on a Llama of random weights and a page of text."""

import copy
import importlib.util
import math
import subprocess
import sys
from pydoc_data.topics import topics
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import prunus

from research import llm_pruning
from research.common import language_model
from tests.helpers.training import same
from tests.oracles.pruning import SINGLE
from tests.recipe.test_shipped_llm import keeps, zeros

SEQLEN = 32
LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.save(model(torch.load(f"{folder}/ids.pt")).logits, f"{folder}/logits.pt")
assert not [name for name in sys.modules if name.partition(".")[0] == "prunus"]
"""
PERMUTED = ["--sparsity-type", "2:4", "--reallocation", "--lsa"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model, its tokenizer and a text."""
    folder = tmp_path_factory.mktemp("model")
    text = "\n\n".join(topics.values())[:4000]
    language_model.train_tokenizer(text, 300).save_pretrained(folder)
    shape = {"hidden_size": 32, "intermediate_size": 48, "layers": 2, "heads": 4}
    shape |= {"key_value_heads": 2, "vocab_size": 300, "seqlen": SEQLEN}
    model = language_model.build(language_model.Settings(**shape))
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape, generator=generator)
    model.save_pretrained(folder)
    (folder / "text.txt").write_text(text)
    return folder


def run(home, *flags):
    """The model after the program has run, in this process."""
    loaded = []

    def load(args):
        loaded.extend(real(args))
        return loaded

    real, text = llm_pruning.load, str(home / "text.txt")
    common = ["--model", str(home), "--device", "cpu", "--calib-dataset", text, "--nsamples", "8"]
    with mock.patch.object(llm_pruning, "load", load):
        llm_pruning.main([*common, *flags])
    return loaded[0]


def matrices(state):
    """Weights of all layers but the head."""
    found = {name: w for name, w in state.items() if name.endswith("_proj.weight")}
    assert len(found) == 14
    return found


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1:4"])
@pytest.mark.parametrize("method", llm_pruning.METHODS)
def test_every_method_meets_its_target_and_prints_what_it_costs(home, method, pattern, capsys):
    model = run(home, "--prune-method", method, "--sparsity-type", pattern)
    pruned, dense = model.state_dict(), load_file(home / "model.safetensors")
    weights = matrices(pruned)
    if pattern == "unstructured":
        assert all(zeros(w) == w.numel() / 2 for w in weights.values())
    else:
        assert all(keeps(w, int(pattern[0]), 4) for w in weights.values())
    assert all(torch.equal(pruned[name], dense[name]) for name in dense if name not in weights)
    cells = [line.split() for line in capsys.readouterr().out.splitlines()]
    (before,) = [row for row in cells if row[:3] == ["LlamaForCausalLM", "dense", "0.0000"]]
    (after,) = [row for row in cells if row[:1] == [method]]
    said = "row" if (method, pattern) == ("wanda", "unstructured") else pattern
    assert after[:3] == [method, said, "0.7500" if pattern == "1:4" else "0.5000"]
    assert before[3] != after[3]


def test_the_perplexity_is_that_of_the_loss_that_transformers_computes(home, capsys):
    model = run(home, "--sparsity-type", "2:4")
    tokenizer = llm_pruning.AutoTokenizer.from_pretrained(home)
    ids = tokenizer((home / "text.txt").read_text(), verbose=False)["input_ids"]
    windows = torch.tensor([ids[i : i + SEQLEN] for i in range(0, len(ids) - SEQLEN + 1, SEQLEN)])
    models = AutoModelForCausalLM.from_pretrained(home), model
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    printed = [float(line[-1]) for line in lines if "dense" in line or line[:1] == ["ria"]]
    losses = [each(input_ids=windows, labels=windows).loss.item() for each in models]
    assert printed == pytest.approx([math.exp(loss) for loss in losses], rel=1e-4)


@pytest.fixture(scope="module")
def saved(home, tmp_path_factory):
    """A folder with a model and what transformers alone computes with it, the model as it was in
    memory, and the same permuted but not pruned; for each way of dealing with shared inputs."""
    ids = torch.randint(300, (3, SEQLEN), generator=torch.Generator().manual_seed(1))
    found, real = {}, prunus.RIA.rebuild
    for shared in ("leave", "residual"):
        dense, folder = [], tmp_path_factory.mktemp(shared)

        def spy(self, w, *args, dense=dense):  # once for each layer, in their order
            dense.append(w.clone())
            return real(self, w, *args)

        with mock.patch.object(prunus.RIA, "rebuild", spy):
            model = run(home, *PERMUTED, "--shared", shared, "--save", str(folder))
        permuted = copy.deepcopy(model)
        weights = dict(zip(matrices(model.state_dict()), dense, strict=True))
        permuted.load_state_dict(weights, strict=False)
        torch.save(ids, folder / "ids.pt")
        found[shared] = folder, model, permuted, ids
    command = [sys.executable, "-c", LOAD, *(str(folder) for folder, *_ in found.values())]
    done = subprocess.run(command, capture_output=True, text=True, env=SINGLE)
    assert done.returncode == 0, done.stderr[-3000:]
    return found


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.mark.parametrize("shared", ["leave", "residual"])
def test_the_saved_model_is_2_of_4_as_stored_and_opens_without_prunus(saved, shared):
    folder, model, _, ids = saved[shared]
    stored = load_file(folder / "model.safetensors")
    assert stored.keys() == model.state_dict().keys()  # nothing that transformers does not know
    assert all(keeps(w, 2, 4) for w in matrices(stored).values())
    torch.testing.assert_close(torch.load(folder / "logits.pt"), logits(model, ids))


@pytest.mark.parametrize("shared", ["leave", "residual"])
def test_before_pruning_the_permuted_model_computes_what_it_did(home, saved, shared):
    _, model, permuted, ids = saved[shared]
    original = AutoModelForCausalLM.from_pretrained(home)
    before, after = original.state_dict(), permuted.state_dict()
    torch.testing.assert_close(logits(permuted, ids), logits(original, ids), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(logits(model, ids), logits(original, ids), rtol=1e-1, atol=1e-1)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    within = ("self_attn.v", "self_attn.o", "mlp.up", "mlp.down")
    assert {f"model.layers.{i}.{n}_proj.weight" for i in range(2) for n in within} <= moved
    assert ("model.embed_tokens.weight" in moved) == (shared == "residual")
    for name in before:  # and the numbers are those of before, in another order
        assert torch.equal(before[name].flatten().sort()[0], after[name].flatten().sort()[0])


def test_the_same_seed_gives_the_same_weights_and_another_one_others(home):
    first, again, other = (run(home, "--seed", seed).state_dict() for seed in ("1", "1", "2"))
    assert same(first, again)
    assert not same(first, other)


def test_options_take_dashes_and_underscores_and_their_values_stay(home, tmp_path):
    folder = tmp_path / "with_underscores-and-dashes"
    dashes = ["--prune-method", "wanda", "--sparsity-ratio", "0.25", f"--save={folder}"]
    underscores = ["--prune_method=wanda", "--sparsity_ratio", "0.25"]
    first, second = (run(home, *flags).state_dict() for flags in (dashes, underscores))
    assert same(first, second)
    assert same(first, load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("method", llm_pruning.METHODS)
def test_per_outneuron_every_output_loses_the_same_as_with_wanda_always(home, method):
    flags = ["--prune-method", method, "--sparsity-ratio", "0.25"]
    together = matrices(run(home, *flags).state_dict())
    by_row = matrices(run(home, *flags, "--per-outneuron").state_dict())
    uneven = [w for w in together.values() if len({zeros(row) for row in w}) > 1]
    assert bool(uneven) == (method != "wanda")
    for w in by_row.values():
        assert {zeros(row) for row in w} == {w.shape[1] // 4}


def test_wanda_prunes_to_other_patterns_as_they_are():
    args = llm_pruning.parse(["--prune-method", "wanda", "--sparsity-type", "4x1"])
    with mock.patch("prunus.prune") as prune:
        llm_pruning.prune(None, [], args)
    assert prune.call_args.kwargs["pattern"] == "4x1"


def test_ria_with_exponent_zero_is_relative_importance(home):
    plain = run(home, "--prune-method", "ri").state_dict()
    assert same(plain, run(home, "--prune-method", "ria", "--a", "0").state_dict())
    assert not same(plain, run(home, "--prune-method", "ria").state_dict())


def test_refit_moves_kept_weights_and_swap_does_not(home):
    name = "model.layers.0.self_attn.q_proj.weight"  # later ones see other inputs
    plain, refit, swap = (run(home, *f).state_dict()[name] for f in ([], ["--refit"], ["--swap"]))
    assert torch.equal(plain != 0, refit != 0)
    assert not torch.equal(plain, refit)
    assert not torch.equal(plain != 0, swap != 0)
    assert torch.equal(swap, load_file(home / "model.safetensors")[name].where(swap != 0, 0))


@pytest.mark.parametrize(
    ("flags", "remedy"),
    [
        (["--lsa"], "are for N:M; give --sparsity-type 2:4"),
        (["--sparsity-type", "unstructred"], "did you mean 'unstructured'?"),
        (["--semi-sparse-acc", "--sparsity-type", "2:4", "--device", "cpu"], "and a CUDA device"),
        (["--swap", "--prune-method", "sparsegpt"], "--swap is for wanda, ri and ria"),
        (["--refit", "--prune-method", "magnitude"], "which magnitude does not"),
        ([*PERMUTED, "--shared", "gather", "--save", "x"], "use --shared residual or leave"),
        (["--allocator", "owl", "--sparsity-type", "2:4"], "2:4 fixes every layer's share"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_remedy(flags, remedy, capsys):
    with pytest.raises(SystemExit, match="2"):
        llm_pruning.parse(flags)
    assert remedy in capsys.readouterr().err


def test_zero_shot_tasks_say_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        llm_pruning.parse(["--eval-zero-shot"])
    assert "pip install 'lm_eval[hf]'" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--calib-dataset", "--eval-dataset"])
def test_a_text_that_is_too_short_is_refused_before_anything_is_pruned(home, option, tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    said = pytest.raises(ValueError, match="seqlen=32, but text has .* pass a longer text")
    with mock.patch.object(llm_pruning, "prune") as prune, said:
        run(home, option, str(tmp_path / "short.txt"))
    prune.assert_not_called()
