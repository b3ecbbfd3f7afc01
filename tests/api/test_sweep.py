"""Sweeps over several methods, patterns and seeds, and reports that add up."""

import re

import pytest
import torch
from torch import nn

import prunus
from prunus import CAP, Calibration, Magnitude, Wanda
from prunus.report.records import read_records
from prunus.report.summary import Summary

from tests.oracles.pruning import small_mlp


def zeros(model):
    return {"zeros": float(prunus.sparsity(model)["0"])}


def batches(count=4):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(8, 8, generator=generator) for _ in range(count)]


def test_each_row_is_what_a_sweep_of_its_own_says():
    model, data = small_mlp(), Calibration(batches())
    x = batches(1)[0]

    def evaluate(model):
        return float(model(x).detach().square().sum())

    before = [p.clone() for p in model.parameters()]
    both = prunus.sweep(
        model, ["magnitude", "wanda"], [0.25, 0.5], evaluate,
        pattern=["unstructured", "row", "2:4"], layers="0", calibration=data,
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert len(both.rows) == 2 * (2 + 2 + 1)
    assert both.values == {}
    for name in ("magnitude", "wanda"):
        for pattern in ("unstructured", "row"):
            alone = prunus.sweep(
                model, name, [0.25, 0.5], evaluate,
                pattern=pattern, layers="0", calibration=data,
            )  # fmt: skip
            assert both.curves[f"{name}, {pattern}"] == alone.values
        prunus.prune(model, name, pattern="2:4", layers="0", calibration=data)
        assert both.curves[f"{name}, 2:4"] == {0.5: {"value": evaluate(model)}}
        for p, old in zip(model.parameters(), before, strict=True):
            p.data.copy_(old)


def test_seeds_begin_random_numbers_anew_and_leave_those_of_the_caller():
    drawn = []

    class Drawing:
        def __iter__(self):
            drawn.append(torch.randint(1000, ()).item())
            return iter(batches())

    model = small_mlp()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    result = prunus.sweep(
        model, "wanda", [0.5], zeros, calibration=Calibration(Drawing()), seeds=[1, 2, 1]
    )
    assert torch.equal(torch.rand(3), expected)
    assert drawn[0] == drawn[2] != drawn[1]
    assert [row.seed for row in result.rows] == [1, 2, 1]


def test_a_function_of_the_seed_makes_the_model_and_curves_are_means():
    made = []

    def build(seed):
        torch.manual_seed(seed)
        made.append(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)))
        return made[-1]

    def first(model):
        return float(made.index(model))

    result = prunus.sweep(build, Magnitude(), [0.5, 0.75], first, seeds=[7, 8, 9])
    assert len(made) == 3
    assert result.values == {0.5: {"value": 1.0}, 0.75: {"value": 1.0}}
    assert [row.metrics["value"] for row in result.rows] == [0.0, 0.0, 1.0, 1.0, 2.0, 2.0]


def test_the_table_shows_what_was_varied():
    result = prunus.sweep(small_mlp(), ["magnitude", "ri"], [0.5], zeros, seeds=[0, 1])
    assert list(result.header()) == ["pruner", "seed", "sparsity", "zeros"]
    assert [row[:3] for row in result.cells()] == [
        ("magnitude", "0", "0.5000"), ("ri", "0", "0.5000"),
        ("magnitude", "1", "0.5000"), ("ri", "1", "0.5000"),
    ]  # fmt: skip
    plain = prunus.sweep(small_mlp(), "magnitude", [0.5], zeros)
    assert list(plain.header()) == ["sparsity", "zeros"]


def test_pruners_of_one_name_are_told_apart_by_their_settings():
    model = small_mlp()
    pairs = [(torch.randn(4, 8), torch.randn(4, 4)) for _ in range(4)]
    data = Calibration(pairs, nn.functional.mse_loss)
    pruners = [CAP(block_size=4, num_grads=8), CAP(block_size=8, num_grads=8), "magnitude"]
    result = prunus.sweep(model, pruners, [0.5], zeros, calibration=data)
    assert list(result.curves) == [
        "cap(block_size=4, num_grads=8)", "cap(block_size=8, num_grads=8)", "magnitude",
    ]  # fmt: skip
    named = {"small blocks": pruners[0], "large": pruners[1]}
    assert list(prunus.sweep(model, named, [0.5], zeros, calibration=data).curves) == [*named]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pruner": []}, "no pruners were given"),
        ({"pruner": ["magnitude", Magnitude()]}, "magnitude stands twice among the pruners"),
        ({"pruner": ["magnitude", "wand"]}, "unknown pruner 'wand'; did you mean 'wanda'"),
        ({"pattern": []}, "no patterns were given"),
        ({"pattern": ["unstructured", "2:3:4"]}, "2:3:4"),
        ({"pattern": "2:4"}, "pattern '2:4' has one sparsity only"),
        ({"seeds": []}, "seeds is empty"),
        ({"model": lambda seed: 3, "seeds": [1]}, r"model\(1\) returned int, not a torch"),
        ({"model": lambda seed: small_mlp()}, "a function of a seed goes with seeds="),
        ({"sparsities": [float("nan")]}, "sparsity nan is not between 0 and 1"),
        ({"pruner": ["magnitude", Wanda()]}, "wanda"),
    ],
)
def test_what_does_not_fit_is_refused_and_evaluates_nothing(arguments, message):
    evaluated = []
    call = {"model": small_mlp(), "pruner": "magnitude", "sparsities": [0.5], **arguments}
    with pytest.raises(ValueError, match=message):
        prunus.sweep(**call, evaluate=lambda model: evaluated.append(model) or 0.0)
    assert not evaluated or "wanda" in message


def test_a_second_report_adds_to_the_first_and_replaces_what_is_the_same(tmp_path):
    pytest.importorskip("matplotlib")
    values = iter((1.0, 2.0, 3.0, 4.0, 5.0))

    def run(name, sparsities):
        prunus.sweep(small_mlp(), name, sparsities, lambda m: next(values)).report(tmp_path)
        return Summary(read_records(tmp_path)).swept()["value"]

    assert run("magnitude", [0.5, 0.75]) == {"magnitude": [(0.5, 1.0), (0.75, 2.0)]}
    assert run("ri", [0.5])["ri"] == [(0.5, 3.0)]
    assert run("magnitude", [0.5, 0.25]) == {
        "magnitude": [(0.25, 5.0), (0.5, 4.0), (0.75, 2.0)], "ri": [(0.5, 3.0)],
    }  # fmt: skip
    assert sum(event["event"] == "start" for event in read_records(tmp_path)) == 1


def test_one_picture_and_one_table_hold_all_patterns_and_seeds(tmp_path):
    pytest.importorskip("matplotlib")
    result = prunus.sweep(
        small_mlp(), ["magnitude", "ri"], [0.25, 0.5], lambda m: torch.rand(()).item(),
        pattern=["unstructured", "2:4"], seeds=[0, 1, 2],
    )  # fmt: skip
    result.report(tmp_path)
    assert [*Summary(read_records(tmp_path)).swept()["value"]] == [
        "magnitude, unstructured", "ri, unstructured", "magnitude, 2:4", "ri, 2:4",
    ]  # fmt: skip
    page = (tmp_path / "report.html").read_text()
    assert "<th>pattern</th><th>seed</th>" in page
    assert len(re.findall(r"<td>0\.\d{4}</td><td>(?:magnitude|ri)</td>", page)) == len(result.rows)
    assert (tmp_path / "report.png").stat().st_size > 0
