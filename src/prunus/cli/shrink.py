"""The commands `prunus shrink` and `prunus groups`: channels that are removed, not zeroed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import prunus
from prunus.channels import channels
from prunus.channels import save as save_shapes
from prunus.channels import shrink as shrink_model
from prunus.channels.shapes import beside, load
from prunus.cli.arguments import call_batch, call_calibration, call_model
from prunus.core.files import check_writable

Model = Annotated[str, typer.Argument(help="package.module:function that returns the model")]
Inputs = Annotated[str, typer.Option(help="package.module:function that returns a batch of inputs")]
out = Console(markup=False, emoji=False)


def groups(model: Model, inputs: Inputs) -> None:
    """Which channels and heads of a model go together, and which cannot go."""
    out.print(str(channels(call_model(model), call_batch(inputs))))


def shrink(
    model: Model,
    inputs: Inputs,
    output: Annotated[Path, typer.Option(help="safetensors file to write, and JSON beside it")],
    target: Annotated[str, typer.Option(help="what remains: macs=0.5, params=0.5")] = "macs=0.5",
    criterion: Annotated[str, typer.Option(help="or none: what is zero already")] = "magnitude",
    allocator: Annotated[str, typer.Option(help="uniform or global")] = "uniform",
    round_to: Annotated[int, typer.Option(help="widths are multiples of this")] = 1,
    layers: Annotated[list[str] | None, typer.Option(help="names or globs")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="what to leave whole")] = None,
    calibration: Annotated[str, typer.Option(help="package.module:function of the data")] = "",
    compensate: Annotated[bool, typer.Option(help="refit what reads the removed channels")] = False,
    uniform: Annotated[bool, typer.Option(help="one width for all blocks of a kind")] = False,
    width: Annotated[bool, typer.Option(help="also channels that norms run over")] = False,
    weights: Annotated[Path | None, typer.Option(help="file to load into the model first")] = None,
) -> None:
    """Remove channels and heads from a model and save it, its shapes beside it."""
    kind, equals, value = target.partition("=")
    try:
        goal = {kind: float(value)}
    except ValueError:
        equals = ""
    if not equals:
        raise ValueError(f"--target {target!r} must be written macs=0.5")
    for path in (output, output.with_suffix(".json")):
        check_writable(path)
    network = call_model(model)
    if weights is not None and beside(weights).is_file():
        load(weights, network)
    elif weights is not None:  # of a model that was not shrunk before
        prunus.load(weights, network)
    result = shrink_model(
        network,
        call_batch(inputs),
        None if criterion == "none" else criterion,
        goal,
        allocator,
        round_to=round_to,
        layers=layers,
        exclude=exclude or (),
        calibration=call_calibration(calibration, None) if calibration else None,
        compensate=compensate,
        uniform=uniform,
        width=width,
    )
    save_shapes(network, output)
    size = output.stat().st_size / 2**20
    out.print(f"{result}\n{output}: {size:,.2f} MiB, its shapes in {output.with_suffix('.json')}")
