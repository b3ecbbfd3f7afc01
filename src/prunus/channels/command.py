"""``prunus shrink`` and the listing of groups, ready for the shell's dictionary of commands."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from prunus.calibration import Calibration
from prunus.channels.groups import channels
from prunus.channels.shapes import load, save
from prunus.channels.shrink import shrink


def call(name: str) -> Any:
    """What ``package.module:function`` returns."""
    module, _, function = name.partition(":")
    if not function:
        raise ValueError(f"'{name}' must be written package.module:function")
    if "" not in sys.path:
        sys.path.insert(0, "")
    return getattr(importlib.import_module(module), function)()


def shrink_command(
    model: str,
    inputs: str,
    output: Path,
    target: str = "macs=0.5",
    criterion: str = "magnitude",
    allocator: str = "uniform",
    round_to: int = 1,
    layers: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    calibration: str | None = None,
    compensate: bool = False,
    uniform: bool = False,
    width: bool = False,
    weights: Path | None = None,
) -> str:
    """Remove channels and heads from a model and save it; returns what to print.

    ``model``, ``inputs`` and ``calibration`` are ``package.module:function``.
    """
    network, data = call(model), None if calibration is None else call(calibration)
    if weights is not None:
        load(weights, network)
    if data is not None and not isinstance(data, Calibration):
        data = Calibration(data)
    kind, equals, value = target.partition("=")
    if not equals:
        raise ValueError(f"--target {target!r} must be written macs=0.5")
    result = shrink(
        network,
        call(inputs),
        None if criterion == "none" else criterion,
        {kind: float(value)},
        allocator,
        round_to=round_to,
        layers=layers,
        exclude=exclude,
        calibration=data,
        compensate=compensate,
        uniform=uniform,
        width=width,
    )
    save(network, output)
    size = output.stat().st_size / 2**20
    return f"{result}\n{output}: {size:,.2f} MiB, and its shapes in {output.with_suffix('.json')}"


def groups_command(model: str, inputs: str) -> str:
    """Which channels of a model go together, and which cannot go."""
    with torch.no_grad():
        return str(channels(call(model), call(inputs)))
