import logging
from typing import NamedTuple

import numpy as np
import pytest
import torch

import prunus
from prunus.engine import step as engine

from tests.helpers.toy_pruner import Toy
from tests.helpers.training import same, snapshot
from tests.oracles.pruning import global_keep, small_cnn, small_mlp

RECIPE = """
variables: {sparsity: 0.75}
modifiers:
  - prune:
      layers: ["2"]
      sparsity: {from: 0.3, to: "${sparsity}"}
      window: {from: 1ep, to: 5ep}
  - learning_rate: {to: 0.1}
"""


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.933])
def test_global_magnitude_is_the_slow_answer(sparsity):
    model = small_mlp(torch.float64)
    scores = [model[0].weight.detach().abs(), model[2].weight.detach().abs()]
    k = round(sparsity * sum(s.numel() for s in scores))
    expected = [
        w * keep
        for w, keep in zip((model[0].weight, model[2].weight), global_keep(scores, k), strict=True)
    ]
    expected = [e.detach().clone() for e in expected]
    prunus.prune(model, "magnitude", sparsity=sparsity)
    assert torch.equal(model[0].weight, expected[0])
    assert torch.equal(model[2].weight, expected[1])


def test_layers_of_different_dtypes_are_ranked_together():
    model = small_mlp()
    model[2].to(torch.bfloat16)
    result = prunus.prune(model, "magnitude", sparsity=0.5)
    assert result.sparsity == 0.5
    assert model[2].weight.dtype == torch.bfloat16


def test_a_recipe_is_applied_at_its_final_sparsity(caplog):
    with caplog.at_level(logging.INFO, "prunus"):
        result = prunus.prune(small_mlp(), RECIPE)
    assert [(row.name, row.sparsity) for row in result.rows] == [("2", 0.75)]
    assert "learning_rate needs training" in caplog.text
    assert prunus.prune(small_mlp(), RECIPE, sparsity=0.5).sparsity == 0.5


def test_a_recipe_file_is_known_by_its_ending(tmp_path):
    (tmp_path / "r.yaml").write_text(RECIPE)
    assert prunus.prune(small_mlp(), str(tmp_path / "r.yaml")).sparsity == 0.75
    assert prunus.prune(small_mlp(), tmp_path / "r.yaml").sparsity == 0.75
    with pytest.raises(ValueError, match="layers belong in the recipe"):
        prunus.prune(small_mlp(), tmp_path / "r.yaml", layers=["0"])


def test_a_recipe_without_a_prune_entry_is_refused():
    with pytest.raises(ValueError, match="no 'prune' entry"):
        prunus.prune(small_mlp(), "modifiers:\n  - learning_rate: {to: 0.1}\n")


def test_a_failing_second_modifier_undoes_the_first():
    model = small_mlp()
    with torch.no_grad():
        model[2].weight[0, 0] = float("inf")
    before = snapshot(model)
    two = (
        "modifiers:\n  - prune: {sparsity: 0.5, layers: ['0']}\n"
        "  - prune: {sparsity: 0.5, layers: ['2']}\n"
    )
    with pytest.raises(ValueError, match=r"2\.weight has 1 NaN or infinite"):
        prunus.prune(model, two)
    assert same(model, before)


def test_an_interrupt_while_weights_are_written_puts_them_back(monkeypatch):
    model = small_mlp()
    before = snapshot(model)
    copies = []
    original = torch.Tensor.copy_

    def interrupted(self, other, *args):
        copies.append(1)
        if len(copies) == 2:
            original(self, other)
            raise KeyboardInterrupt
        return original(self, other, *args)

    commit = engine.commit

    def watched(changes):
        monkeypatch.setattr(torch.Tensor, "copy_", interrupted)
        commit(changes)

    monkeypatch.setattr(engine, "commit", watched)
    with pytest.raises(KeyboardInterrupt):
        prunus.prune(model, "magnitude", sparsity=0.5)
    monkeypatch.undo()
    assert len(copies) >= 2
    assert same(model, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"pruner": "magnitud", "sparsity": 0.5},
            "unknown pruner 'magnitud'; did you mean 'magnitude'",
        ),
        ({"pruner": "magnitude"}, "no sparsity was given"),
        ({"pruner": "magnitude", "sparsity": 1.2}, "sparsity 1.2 is not between 0 and 1"),
        (
            {"pruner": "magnitude", "sparsity": 0.5, "pattern": "3:5"},
            "drop 'sparsity', or write that",
        ),
        (
            {"pruner": "magnitude", "pattern": "2:5"},
            "0: pattern 2:5 does not divide 8 input channels; use 2:4 or 2:8",
        ),
        ({"pruner": "magnitude", "sparsity": 0.5, "allocator": "gloabl"}, "did you mean 'global'"),
        (
            {"pruner": "magnitude", "sparsity": 0.5, "layers": ["9"]},
            "layer pattern '9' matches nothing",
        ),
        ({"pruner": "missing.yaml"}, "no recipe file 'missing.yaml'"),
    ],
)
def test_bad_arguments_leave_the_model_untouched(arguments, message):
    model = small_mlp()
    before = snapshot(model)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prunus.prune(model, **arguments)
    assert same(model, before)


def test_a_target_below_the_present_sparsity_is_refused():
    model = small_mlp()
    prunus.prune(model, "magnitude", sparsity=0.75)
    before = snapshot(model)
    with pytest.raises(ValueError, match="sparsity is 0.7500 already, above the target 0.5"):
        prunus.prune(model, "magnitude", sparsity=0.5)
    assert same(model, before)


def test_the_result_prints_as_a_table_and_as_html():
    result = prunus.prune(small_cnn(), "magnitude", sparsity=0.5)
    text = str(result)
    assert "score lost" in text
    assert "8x16x3x3" in text
    assert "3 layers" in text
    assert "left dense: 0 (reads the input); 10 (writes the output)" in " ".join(text.split())
    assert all(len(line) <= 80 for line in text.splitlines())
    html = result._repr_html_()
    assert html.startswith("<table>")
    assert html.count("<tr>") == 5


def test_score_lost_is_the_share_of_the_score_that_went():
    model = small_mlp()
    before = model[2].weight.abs().detach()
    result = prunus.prune(model, "magnitude", sparsity=0.5, layers=["2"])
    lost = 1 - model[2].weight.detach().abs().sum() / before.sum()
    assert result.rows[0].score_lost == pytest.approx(float(lost), abs=1e-6)


def test_sparsity_counts_zeros_layer_by_layer():
    model = small_mlp()
    prunus.prune(model, "magnitude", sparsity=0.5)
    table = prunus.sparsity(model)
    zeros = sum(int((model[i].weight == 0).sum()) for i in (0, 2, 4))
    assert float(table) == zeros / (256 + 512 + 64)
    assert table["4"] == 0
    assert "3 layers" in str(table)


@pytest.mark.parametrize("pruner", ["magnitude", Toy(scale=1.5)])
def test_a_sweep_is_the_separate_runs_and_restores_the_weights(pruner):
    model = small_cnn(torch.float64)
    data = prunus.Calibration([torch.randn(2, 3, 8, 8, dtype=torch.float64)])
    layers = ["5", "8"]
    before, x = snapshot(model), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    seen = []

    def evaluate(m):
        seen.append(snapshot(m))
        return {"mean": m.eval()(x).mean(), "sparsity": float(prunus.sparsity(m))}

    result = prunus.sweep(
        model, pruner, [0.5, 0.9, 0.75], evaluate, layers=layers, calibration=data
    )
    assert same(model, before)
    assert list(result.values) == [0.5, 0.9, 0.75]
    assert "mean" in str(result)
    for sparsity, state in zip([0.5, 0.9, 0.75], seen, strict=True):
        alone = small_cnn(torch.float64)
        alone.load_state_dict(before)
        prunus.prune(alone, pruner, sparsity=sparsity, layers=layers, calibration=data)
        assert same(alone, state)


def test_a_sweep_whose_evaluation_fails_restores_the_weights():
    model = small_mlp()
    before = snapshot(model)

    def evaluate(m):
        raise RuntimeError("evaluation failed")

    with pytest.raises(RuntimeError, match="evaluation failed"):
        prunus.sweep(model, "magnitude", [0.5], evaluate)
    assert same(model, before)
    with pytest.raises(ValueError, match="sparsity 5 is not between"):
        prunus.sweep(model, "magnitude", [0.5, 5], lambda m: 0.0)
    with pytest.raises(ValueError, match="has one sparsity only"):
        prunus.sweep(model, "magnitude", [0.5], lambda m: 0.0, pattern="2:4")


class Output:
    def __init__(self, loss):
        self.loss = loss


@pytest.mark.parametrize("kind", ["tensors", "pairs", "mappings", "forward"])
def test_calibration_takes_what_people_have(kind):
    x = torch.randn(4, 8)
    model = small_mlp()
    forward = None
    batches = {
        "tensors": [x],
        "pairs": [(x, torch.zeros(4))],
        "mappings": [{"input": x}],
        "forward": [{"anything": x}],
    }[kind]
    if kind == "forward":

        def forward(m, batch):
            return m(batch["anything"]).sum()

    data = prunus.Calibration(batches, forward=forward)
    result = prunus.prune(model, Toy(), sparsity=0.5, calibration=data)
    assert result.sparsity == 0.5


def test_calibration_that_cannot_serve_says_so():
    model = small_mlp()
    before = snapshot(model)
    with pytest.raises(ValueError, match="can be read only once"):
        prunus.Calibration(iter([torch.randn(2, 8)]))
    with pytest.raises(ValueError, match="num_batches=0"):
        prunus.Calibration([torch.randn(2, 8)], num_batches=0)
    with pytest.raises(ValueError, match="the calibration data is empty"):
        prunus.prune(model, Toy(), sparsity=0.5, calibration=prunus.Calibration([]))
    unused = torch.nn.ModuleDict({"a": torch.nn.Linear(8, 8), "b": torch.nn.Linear(8, 8)})
    data = prunus.Calibration([torch.randn(2, 8)], forward=lambda m, x: m["a"](x))
    with pytest.raises(ValueError, match="no calibration batch reached b; nothing was pruned"):
        prunus.prune(unused, Toy(), sparsity=0.5, layers=["a", "b"], calibration=data)
    assert same(model, before)


def test_only_the_first_batches_are_read_when_asked():
    read = []

    class Batches:
        def __iter__(self):
            for _ in range(10):
                read.append(1)
                yield torch.randn(2, 8)

    data = prunus.Calibration(Batches(), num_batches=3)
    prunus.prune(small_mlp(), Toy(), sparsity=0.5, layers=["0"], calibration=data)
    assert len(read) == 1 + 3  # one asks whether the output depends on the input
    prunus.prune(small_mlp(), Toy(), sparsity=0.5, calibration=data)
    assert len(read) == 1 + 3 + 1 + 1 + 3  # one shows the ends of the network


@pytest.mark.parametrize("number", [np.float64(0.5), np.float32(0.5), torch.tensor(0.5)])
def test_a_sparsity_may_be_a_number_of_numpy_or_torch(number):
    assert prunus.prune(small_mlp(), "magnitude", sparsity=number).sparsity == 0.5


def test_the_sparsities_of_a_sweep_may_come_from_a_generator():
    result = prunus.sweep(small_mlp(), "magnitude", (s / 4 for s in (2, 3)), lambda m: 0.0)
    assert list(result.values) == [0.5, 0.75]
    with pytest.raises(ValueError, match="no sparsities were given"):
        prunus.sweep(small_mlp(), "magnitude", [], lambda m: 0.0)


def test_what_is_no_pruner_or_allocator_is_refused_with_what_is():
    model = small_mlp()
    with pytest.raises(
        ValueError, match=r"is no pruner; give a name \(alps, cap, fastcap, magnitude"
    ):
        prunus.prune(model, prunus.Magnitude, sparsity=0.5)
    with pytest.raises(ValueError, match="is no allocator; one of: alphapruning, erk, global"):
        prunus.prune(model, "magnitude", sparsity=0.5, allocator=prunus.allocators.ERK)
    with pytest.raises(ValueError, match="take names of layers and classes, not <class"):
        prunus.prune(model, "magnitude", sparsity=0.5, layers=[torch.nn.Linear])
    assert float(prunus.sparsity(model)) == 0


def test_a_failed_run_leaves_the_records_of_the_last_one(tmp_path):
    model = small_mlp()
    prunus.prune(model, "magnitude", sparsity=0.5, output_dir=tmp_path)
    before = (tmp_path / "records.jsonl").read_text()
    assert '"event": "prune"' in before
    for wrong in ({"sparsity": 0.1}, {"sparsity": 0.9, "layers": ["9"]}):
        with pytest.raises(ValueError):
            prunus.prune(model, "magnitude", output_dir=tmp_path, **wrong)
    assert (tmp_path / "records.jsonl").read_text() == before


@pytest.mark.parametrize("pattern", ["unstructured", "row"])
@pytest.mark.parametrize("allocator", ["global", "uniform", "erk"])
def test_empty_layers_and_layers_of_one_weight_take_part(pattern, allocator):
    empty = torch.nn.Linear(4, 4)
    empty.weight = torch.nn.Parameter(torch.empty(0, 4))
    model = torch.nn.Sequential(empty, torch.nn.Linear(4, 4), torch.nn.Linear(1, 1))
    arguments = {"layers": ["*"], "pattern": pattern, "allocator": allocator}
    result = prunus.prune(model, "magnitude", sparsity=0.5, **arguments)
    assert sum(row.zeros for row in result.rows) == round(0.5 * 17)


def test_every_layer_that_a_pattern_does_not_fit_is_named_at_once():
    with pytest.raises(ValueError, match=r"2: pattern 3:6 does not .*; nor does it fit 5, 8"):
        prunus.prune(small_cnn(), "magnitude", pattern="3:6")


def test_the_score_of_a_block_of_fp16_neither_overflows_nor_ties():
    model = torch.nn.Sequential(torch.nn.Linear(4, 2, dtype=torch.float16))
    w = torch.tensor([[6e4, 6e4, 2.048e3, 0.5], [6e4, 6e4, 0.5, 0.5]], dtype=torch.float16)
    with torch.no_grad():
        model[0].weight.copy_(w)
    prunus.prune(model, "magnitude", sparsity=0.5, layers=["0"], pattern="2x2")
    assert torch.equal(model[0].weight != 0, torch.tensor([[1, 1, 0, 0]] * 2, dtype=torch.bool))


def test_a_table_of_sparsities_formats_as_a_number_and_knows_its_layers():
    table = prunus.sparsity(small_mlp())
    assert f"{table:.1%}" == "0.0%"
    assert f"{table}" == str(table)
    with pytest.raises(KeyError, match="no layer '3'; one of: 0, 2, 4"):
        _ = table["3"]


def test_named_tuples_are_batches():
    class Batch(NamedTuple):
        inputs: torch.Tensor
        targets: torch.Tensor

    data = prunus.Calibration([Batch(torch.randn(2, 8), torch.zeros(2))])
    assert prunus.prune(small_mlp(), Toy(), sparsity=0.5, calibration=data).sparsity == 0.5
