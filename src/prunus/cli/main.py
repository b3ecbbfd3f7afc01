"""The command line: ``prunus list | show | check | prune | bench | estimate | shrink ...``.

A model or a loader is named ``package.module:function``; the function is called without arguments.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.text import Text

import prunus
from prunus.calibration.calibration import Calibration
from prunus.cli.arguments import (
    call_batch,
    call_calibration,
    call_model,
    known_device,
    overrides,
)
from prunus.cli.bench import bench as bench_table
from prunus.cli.catalogue import description, listing, shipped_listing
from prunus.cli.estimate import estimate
from prunus.cli.preview import goal, preview, timetable
from prunus.cli.shrink import groups, shrink
from prunus.core.files import atomic_write, check_writable
from prunus.core.unseen import told
from prunus.integrations.sparseml.convert import convert as convert_recipe
from prunus.modifiers import Context, OneShotModifier
from prunus.modifiers.timing import Timeline
from prunus.recipe import Recipe, json_schema

app = typer.Typer(
    help=prunus.__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
for command in (estimate, groups, shrink):
    app.command()(command)
out = Console(markup=False, emoji=False)  # `attn.qkv[q]` is a name, not markup

ModelOption = Annotated[str, typer.Option(help="package.module:function that returns the model")]
MemoryOption = Annotated[
    str | None, typer.Option(help="for statistics, such as 8GiB; default: most of what is free")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="name=value for a variable of the recipe")
]


def main() -> None:
    """Entry point: an error is one line, not a traceback."""
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        Console(stderr=True).print(Text(f"error: {error}", style="red"), soft_wrap=True)
        sys.exit(2)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"prunus {version('prunus')}, torch {torch.__version__}")
        raise typer.Exit


@app.callback(help=prunus.__doc__)
def options(
    _: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="print it and stop"),
    ] = False,
) -> None:
    """What goes before a command."""


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help="'recipes': those that come with it")] = "names",
) -> None:
    """What recipes can name: pruners, patterns, allocators, modifiers, curves; or the recipes."""
    if what not in ("names", "recipes"):
        raise ValueError(f"list knows 'names' and 'recipes', not {what!r}")
    out.print(*(listing() if what == "names" else shipped_listing()), sep="\n")


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="a pruner, allocator, modifier or masking")],
) -> None:
    """The description and the settings of one thing that `list` names."""
    out.print(*description(name), sep="\n")


@app.command()
def check(
    recipe: Annotated[str, typer.Argument(help="a recipe file")],
    model: ModelOption = "",
    steps_per_epoch: Annotated[int | None, typer.Option(help="optimizer steps")] = None,
    epochs: Annotated[float | None, typer.Option(help="length of training")] = None,
    calibration: Annotated[
        str | None, typer.Option(help="package.module:function, whose first batch shows the ends")
    ] = None,
    memory: MemoryOption = None,
    set_: SetOption = None,
) -> None:
    """Which layers a recipe prunes, when, how sparse, and the memory it takes; changes nothing."""
    loaded = Recipe.load(recipe, **overrides(set_))
    out.print(f"{recipe}: {', '.join(m.name for m in loaded.modifiers)}: reads well")
    if not model:
        out.print("give --model to see its layers, the times and the memory")
        return
    network = call_model(model)
    if unseen := told(network):
        out.print(unseen)
    timeline = Timeline(steps_per_epoch, loaded.epochs if epochs is None else epochs)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    data = call_calibration(calibration, memory) or Calibration((), memory=memory)
    try:
        context = Context(network, optimizer, timeline, data)
        runs = [modifier.bind(context) for modifier in loaded.modifiers]
    except ValueError as error:
        at_once = [m for m in loaded.modifiers if m.one_shot and isinstance(m, OneShotModifier)]
        unknown = "steps_per_epoch" in str(error)  # how long training is, and nothing else
        if steps_per_epoch is not None or not (at_once or unknown):
            raise
        out.print(f"shown as a one-shot run, without --steps-per-epoch ({error})")
        for modifier in at_once:
            where = f"modifiers[{loaded.modifiers.index(modifier)}] {modifier.name}"
            plan = modifier.plan(network, data)
            out.print(*preview(plan, where), goal(plan, modifier.final_sparsity), sep="\n")
        return
    for i, run in enumerate(runs):
        where = f"modifiers[{i}] {loaded.modifiers[i].name}"
        if run.masked_layers:
            out.print(*preview(run, where), sep="\n")
        out.print(timetable(run, where, steps_per_epoch))


@app.command()
def schema(
    output: Annotated[Path | None, typer.Option(help="file to write; default: the screen")] = None,
) -> None:
    """JSON schema of a recipe, for editors."""
    text = json.dumps(json_schema(), indent=2)
    if output is None:
        typer.echo(text)
    else:
        with atomic_write(output) as draft:
            draft.write_text(text + "\n", encoding="utf-8")


@app.command()
def convert(
    recipe: Annotated[str, typer.Argument(help="a recipe file of SparseML 1.x or CAP")],
    output: Annotated[Path | None, typer.Option(help="file to write; default: the screen")] = None,
    dialect: Annotated[
        str | None, typer.Option(help="sparseml or cap; default: what its modifiers show")
    ] = None,
    set_: SetOption = None,
) -> None:
    """The same recipe in our own words; comments say what has no counterpart."""
    if output is not None:
        check_writable(output)
    text = convert_recipe(recipe, dialect, overrides(set_))
    if output is None:
        typer.echo(text, nl=False)
        return
    if output.exists() and Path(recipe).exists() and output.samefile(recipe):
        raise ValueError(f"--output {output} is the recipe itself; give it another name")
    with atomic_write(output) as draft:
        draft.write_text(text, encoding="utf-8")


@app.command()
def prune(
    pruner: Annotated[str, typer.Argument(help="a pruner's name or a recipe file")],
    model: ModelOption,
    output: Annotated[Path, typer.Option(help="safetensors file to write")],
    sparsity: Annotated[float | None, typer.Option(help="share of weights to remove")] = None,
    pattern: Annotated[str | None, typer.Option(help="unstructured, row, 2:4, 4x1")] = None,
    layers: Annotated[list[str] | None, typer.Option(help="name, glob, class or re:")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="what to leave out")] = None,
    allocator: Annotated[
        str | None, typer.Option(help="global, uniform, erk, owl, alphapruning")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="package.module:function, a Calibration or batches")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="safetensors file to load into the model first")
    ] = None,
    compact: Annotated[bool, typer.Option(help="store sparse tensors packed")] = False,
    memory: MemoryOption = None,
    recalibrate: Annotated[
        bool, typer.Option(help="estimate BatchNorm statistics anew on the calibration data")
    ] = False,
    sequential: Annotated[
        str | None, typer.Option(help="prune block by block: the list's name, or 'auto'")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="where the block is that is worked on, with --sequential")
    ] = None,
    folder: Annotated[
        str | None, typer.Option(help="where finished blocks are written, with --sequential")
    ] = None,
    shared: Annotated[
        str, typer.Option(help="channels that several layers read: leave, residual or gather")
    ] = "leave",
    permute: Annotated[
        str | None, typer.Option(help="regroup channels before N:M pruning: lsa or reallocate")
    ] = None,
    misfits: Annotated[
        str, typer.Option(help="of layers that the pattern does not divide: error or dense")
    ] = "error",
    unreached: Annotated[
        str, typer.Option(help="of layers without calibration data: error, magnitude or dense")
    ] = "error",
    report: Annotated[Path | None, typer.Option(help="folder for report.html")] = None,
) -> None:
    """Prune a model at once and save it."""
    if (device or folder) and sequential is None:
        raise ValueError("--device and --folder are for --sequential; give --sequential auto too")
    check_writable(output)
    if report is not None:
        check_writable(report / "report.html")
    blocks = None if sequential == "auto" else sequential
    network = call_model(model)
    if weights is not None:
        prunus.load(weights, network)
    result = prunus.prune(
        network,
        pruner,
        sparsity=sparsity,
        pattern=pattern,
        layers=layers,
        exclude=exclude or (),
        allocator=allocator,
        calibration=call_calibration(calibration, memory),
        recalibrate=recalibrate,
        sequential=sequential is not None and prunus.Sequential(blocks, device, folder=folder),
        permute=None if permute is None else prunus.Permute(permute, shared),  # type: ignore[arg-type]
        misfits=misfits,  # type: ignore[arg-type]
        unreached=unreached,  # type: ignore[arg-type]
    )
    out.print(result)
    prunus.save(network, output, pruning=result, compact=compact)
    out.print(f"{output}: {output.stat().st_size / 2**20:,.2f} MiB")
    if report is not None:
        result.report(report)
        out.print(f"{report / 'report.html'}")


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="package.module:function that returns the model")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="safetensors file to load into the model first")
    ] = None,
    batch: Annotated[
        str | None, typer.Option(help="package.module:function, a batch, batches or a Calibration")
    ] = None,
    rows: Annotated[int, typer.Option(help="input rows of each layer, without --batch")] = 128,
    device: Annotated[str, typer.Option(help="where to measure: cpu or cuda")] = "cpu",
) -> None:
    """How fast a pruned model runs here in sparse forms, layer by layer."""
    where = known_device(device)
    network = call_model(model)
    if checkpoint is not None:
        prunus.load(checkpoint, network)
    network.to(where)
    out.print(*bench_table(network, call_batch(batch), rows=rows), sep="\n")


@app.command()
def report(directory: Annotated[Path, typer.Argument(help="where records.jsonl is")]) -> None:
    """Make report.html and report.png from the records of a run."""
    from prunus.report import write_report

    out.print(str(write_report(directory)))
