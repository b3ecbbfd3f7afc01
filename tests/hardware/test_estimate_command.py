"""`prunus estimate` prints what the function returns."""

import json

import torch
import typer
from torch import nn
from typer.testing import CliRunner

import prunus
from prunus.cli.estimate import estimate


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def batches():
    return [(torch.ones(5, 16), torch.zeros(5))]


def run(*arguments):
    app = typer.Typer()
    app.command()(estimate)
    names = [f"{__name__}:build", "--batch", f"{__name__}:batches"]
    return CliRunner().invoke(app, [*names, *arguments], catch_exceptions=False)


def test_a_table_is_printed():
    output = run().output
    assert "0" in output
    assert "45 nm" in output
    assert "EIE with 64 elements" in output


def test_json_report_and_checkpoint(tmp_path):
    model = build()
    prunus.prune(model, "magnitude", sparsity=0.75, layers=["0"])
    prunus.save(model, tmp_path / "m.safetensors")
    arguments = ["--json", "--elements", "8", "--report", str(tmp_path / "report")]
    result = run("--checkpoint", str(tmp_path / "m.safetensors"), *arguments)
    data = json.loads(result.output)
    assert data["layers"][0]["density"] == 0.25
    assert data["layers"][0]["macs"] == 5 * 16 * 32
    assert data["machine"]["elements"] == 8
    assert (tmp_path / "report" / "estimate.html").is_file()
