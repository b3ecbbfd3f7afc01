"""What the command line is given: functions by name, variables, batches, a device."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from prunus.calibration.calibration import Calibration
from prunus.core.names import did_you_mean


def call(name: str) -> Any:
    """What ``package.module:function`` returns, or the object of this name where it is no function.

    Raises ValueError if there is no such thing, and for whatever its code raises, with the type,
    the file and the line.
    """
    module_name, _, path = name.partition(":")
    if not path or not module_name:
        raise ValueError(f"'{name}' must be written package.module:function")
    if "" not in sys.path:
        sys.path.insert(0, "")  # modules beside the shell's working directory
    found = _found(_imported(module_name, name), path, module_name)
    # a model can be called too, but not without inputs
    if not callable(found) or isinstance(found, nn.Module):
        return found
    try:
        inspect.signature(found).bind()
    except (TypeError, ValueError):
        raise ValueError(f"'{name}' cannot be called without arguments; wrap it") from None
    with telling(f"'{name}' raised"):
        return found()


def _imported(module: str, name: str) -> ModuleType:
    importlib.invalidate_caches()
    try:
        with telling(f"importing '{module}' of '{name}' raised"):
            return importlib.import_module(module)
    except ValueError as error:
        lacking = error.__cause__
        parents = [module[:i] for i in range(len(module) + 1) if f"{module}."[i] == "."]
        if isinstance(lacking, ModuleNotFoundError) and lacking.name in parents:
            raise ValueError(f"cannot import '{module}' of '{name}': {lacking}") from None
        raise


def _found(module: ModuleType, path: str, name: str) -> Any:
    """The attribute of a module, dots and all."""
    found: Any = module
    for part in path.split("."):
        if not hasattr(found, part):
            public = [n for n in vars(found) if not n.startswith("_")]
            where = name if found is module else f"{name}:{path}"
            what = f"'{where}' has no function or object '{part}'"
            raise ValueError(f"{what}{did_you_mean(part, public)}")
        found = getattr(found, part)
    return found


@contextmanager
def telling(what: str) -> Iterator[None]:
    """Errors of other people's code as one ValueError: ``what``, the type, the file and the line.

    `sys.exit` in it, as in scripts without a main guard, is one of them.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        place = "".join(f" ({file}:{line})" for file, line in _place(error))
        message = f"{what} {type(error).__name__}: {error}{place}"
        raise ValueError(message) from error


def _place(error: BaseException) -> list[tuple[str, int]]:
    """File and line where it was raised, or the last ones outside of installed packages."""
    if isinstance(error, SyntaxError) and error.filename:
        return [(error.filename, error.lineno or 0)]
    frames = [(f.filename, f.lineno or 0) for f in traceback.extract_tb(error.__traceback__)]
    frames = [f for f in frames if f[0] != __file__ and not f[0].startswith("<")]
    own = [f for f in frames if not {"site-packages", "importlib"} & set(Path(f[0]).parts)]
    return (own or frames)[-1:]


def call_model(name: str) -> nn.Module:
    """The model that ``package.module:function`` returns, or that is called so.

    Raises ValueError for anything else.
    """
    model = call(name)
    if not isinstance(model, nn.Module):
        raise ValueError(f"'{name}' gives {type(model).__name__}, not a torch.nn.Module")
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
        raise ValueError(f"'{name}' gives {type(data).__name__}, not a batch, nor batches")
    with telling(f"the first batch of '{name}' raised"):
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
