"""What the command line is given: functions by name, variables, batches, a device."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunus.calibration.calibration import Calibration
from prunus.core.names import did_you_mean


def call(name: str) -> Any:
    """What ``package.module:function`` returns.

    Raises ValueError if there is no such function.
    """
    module_name, _, function = name.partition(":")
    if not function:
        raise ValueError(f"'{name}' must be written package.module:function")
    if "" not in sys.path:
        sys.path.insert(0, "")  # modules beside the shell's working directory
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"cannot import '{module_name}' of '{name}': {error}") from None
    if not callable(getattr(module, function, None)):
        hint = did_you_mean(function, [n for n, v in vars(module).items() if inspect.isfunction(v)])
        raise ValueError(f"'{module_name}' has no function '{function}'{hint}")
    try:
        inspect.signature(getattr(module, function)).bind()
    except (TypeError, ValueError):
        raise ValueError(f"'{name}' cannot be called without arguments; wrap it") from None
    return getattr(module, function)()


def call_model(name: str) -> nn.Module:
    """The model that ``package.module:function`` returns. Raises ValueError for anything else."""
    model = call(name)
    if not isinstance(model, nn.Module):
        raise ValueError(f"'{name}' returned {type(model).__name__}, not a torch.nn.Module")
    return model


def call_calibration(name: str | None, memory: str | None) -> Calibration | None:
    """The Calibration that ``package.module:function`` returns, or one of the batches it returns.

    ``memory``, if given, replaces its own.
    """
    if name is None:
        return None
    data = call(name)
    if not isinstance(data, Calibration):
        data = Calibration(data)
    return data if memory is None else dataclasses.replace(data, memory=memory)


def call_batch(name: str | None) -> Any:
    """The batch that ``package.module:function`` returns, or the first of the batches.

    A tensor, a mapping and a tuple are a batch. Raises ValueError where there is none.
    """
    if name is None:
        return None
    data = call(name)
    if isinstance(data, Tensor | Mapping | tuple):
        return data
    if not isinstance(data, Iterable):
        raise ValueError(f"'{name}' returned {type(data).__name__}, not a batch, nor batches")
    for batch in data:
        return batch
    raise ValueError(f"'{name}' returned no batches; one is needed")


def overrides(pairs: list[str] | None) -> dict[str, Any]:
    """``name=value`` pairs, the values read as JSON if they are, else as text."""
    values = {}
    for pair in pairs or []:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"--set {pair!r} must be written name=value")
        try:
            values[name] = json.loads(text)
        except json.JSONDecodeError:
            values[name] = text
    return values


def known_device(name: str) -> torch.device:
    """``cpu``, ``cuda`` or ``cuda:1``. Raises ValueError for what is not that, or not there."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device={name!r} is not known here; use --device cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        seen = torch.cuda.device_count() or "no"
        raise ValueError(f"device={name!r}: torch sees {seen} GPU here; use --device cpu")
    return device
