"""The command `prunus estimate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import prunus
from prunus.calibration.batches import to_device
from prunus.cli.arguments import call_batch, call_model, known_device
from prunus.core.files import check_writable
from prunus.hardware import Machine
from prunus.hardware import estimate as estimate_model


def estimate(
    model: Annotated[str, typer.Argument(help="package.module:function that returns the model")],
    batch: Annotated[str, typer.Option(help="package.module:function, a batch or batches")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="safetensors file to load into the model first")
    ] = None,
    elements: Annotated[int, typer.Option(help="processing elements of EIE")] = 64,
    queue: Annotated[int, typer.Option(help="depth of EIE's activation queues")] = 8,
    vectors: Annotated[int, typer.Option(help="input vectors of each layer to run on EIE")] = 8,
    json: Annotated[bool, typer.Option("--json", help="print JSON, no table")] = False,
    report: Annotated[
        Path | None, typer.Option(help="directory for estimate.json, .png and .html")
    ] = None,
    device: Annotated[str, typer.Option(help="where to run the model: cpu or cuda")] = "cpu",
) -> None:
    """What a model's zeros are worth: bytes by format, products, energy at 45 nm, EIE's cycles."""
    where = known_device(device)
    if report is not None:
        check_writable(report / "estimate.json")
    network = call_model(model)
    if checkpoint is not None:
        prunus.load(checkpoint, network)
    network.to(where)
    machine = Machine(elements=elements, queue=queue)
    inputs = to_device(_inputs(call_batch(batch)), where)
    result = estimate_model(network, inputs, machine=machine, vectors=vectors)
    if report is not None:
        result.report(report)
    if json:
        typer.echo(result.to_json())
    else:
        Console(width=None if Console().is_terminal else 150).print(result)


def _inputs(batch: Any) -> Any:
    """Of a pair of inputs and targets the inputs; a mapping and a tensor are as they are."""
    if isinstance(batch, tuple | list) and batch and isinstance(batch[0], torch.Tensor):
        return batch[0]
    return batch
