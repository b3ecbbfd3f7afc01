"""What `--model pkg:name` may name, and what is told of code that raises."""

import sys

import pytest
import torch

from prunus.cli import main as cli
from prunus.cli.arguments import call, call_batch, call_model

MODULE = """
import torch
from torch import nn


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


class Wide(nn.Linear):
    pass


class space:
    build = staticmethod(Net)


net = Net()
batches = [torch.randn(4, 8)]


def broken():
    return [] / 0


def deep():
    return helper({})


def helper(options):
    return options["width"]


def leaves():
    raise SystemExit(3)


def inside_torch():
    return nn.Linear("8", 2)


def bad_batches():
    yield batches[0] @ batches[0]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "given_names.py").write_text(MODULE)
    (tmp_path / "half_module.py").write_text("def build():\n    pass\n\nbuild(3)\n")
    (tmp_path / "no_python.py").write_text("def build(:\n")
    (tmp_path / "lacks.py").write_text("\nimport surely_not_installed\n")
    (tmp_path / "leaving.py").write_text("import sys\nsys.exit()\n")
    (tmp_path / "r.yaml").write_text("modifiers: [{prune: {sparsity: 0.5}}]")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("given_names", "half_module", "no_python", "lacks", "leaving"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["net", "Net", "space.build"])
def test_a_model_is_an_object_a_class_or_a_function(folder, name):
    model = call_model(f"given_names:{name}")
    assert [type(m).__name__ for m in model] == ["Linear", "ReLU", "Linear"]


def test_batches_may_be_a_list(folder):
    assert torch.equal(call_batch("given_names:batches"), call("given_names:batches")[0])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("given_names:broken", r"raised TypeError: unsupported.* \(\S*given_names.py:24\)$"),
        ("given_names:deep", r"raised KeyError: 'width' \(\S*given_names.py:32\)$"),
        ("given_names:leaves", r"raised SystemExit: 3 \(\S*given_names.py:36\)$"),
        ("given_names:inside_torch", r"raised TypeError: .* \(\S*given_names.py:40\)$"),
        ("given_names:Wide", "cannot be called without arguments"),
        ("given_names:neet", "has no function or object 'neet'; did you mean 'Net'"),
        ("given_names:space.bild", "'given_names:space.bild' .* did you mean 'build'"),
        ("given_names:batches", "gives list, not a torch.nn.Module"),
        ("half_module:build", r"importing 'half_module' .* TypeError: .*half_module.py:4\)$"),
        ("no_python:build", r"raised SyntaxError: .*no_python.py:1\)$"),
        ("lacks:build", r"ModuleNotFoundError: No module named 'surely_not.*lacks.py:2\)$"),
        ("leaving:build", r"raised SystemExit: .*leaving.py:2\)$"),
        ("nowhere.at.all:build", "cannot import 'nowhere.at.all' of .* No module named 'nowhere'"),
        (":build", "must be written package.module:function"),
    ],
)
def test_what_cannot_be_had_is_told_with_type_file_and_line(folder, name, message):
    with pytest.raises(ValueError, match=message):
        call_model(name)


def test_a_batch_that_raises_is_told_in_the_same_way(folder):
    with pytest.raises(ValueError, match=r"first batch .* RuntimeError: .*given_names.py:44\)$"):
        call_batch("given_names:bad_batches")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("prune: {sparsity: {from: 0.1, to: 0.8}, window: {from: 1ep}}", "sparsity 0.8000"),
        ("prune: {pattern: '2:4', window: {from: 1ep}}", "magnitude to 2:4, sparsity 0.5000"),
        ("prune: {allocator: {'0': 0.5}, window: {from: 1ep}}", "sparsity by table"),
        ("prune: {sparsity: 0.5}", "after step what"),
        ("learning_rate: {from: 1, to: 0.1, window: {to: 3ep}}", "'3ep' counts epochs"),
        (
            "prune: {sparsity: {from: 0.1, to: 0.8}, window: {from: 0step, to: 9step, every: 9step}}",
            "9 magnitude to unstructured, sparsity 0.8000",
        ),
    ],
)
def test_check_says_how_sparse_without_knowing_the_length(
    folder, recipe, message, capsys, monkeypatch
):
    (folder / "r.yaml").write_text("modifiers:\n  - " + recipe)
    monkeypatch.setattr(cli.out, "_width", 100)
    cli.check("r.yaml", model="given_names:net")
    assert message in " ".join(capsys.readouterr().out.split())


def test_check_refuses_a_name_that_is_not_there_whatever_the_length(folder):
    (folder / "r.yaml").write_text("modifiers:\n  - freeze: {parameters: [nowhere]}")
    with pytest.raises(ValueError, match="parameter pattern 'nowhere' matches nothing"):
        cli.check("r.yaml", model="given_names:net")
