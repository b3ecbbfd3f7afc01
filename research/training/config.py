"""Files of defaults for the options of `sparse_training.py`, timm's own among them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from prunus.core.names import did_you_mean

# of timm's configs: what we do not have, and the value at which that makes no difference
ABSENT = {
    **dict.fromkeys(("apex_amp", "native_amp", "bn_tf", "jsd", "jsd_loss", "split_bn"), False),
    **dict.fromkeys(("resplit", "torchscript", "save_images", "use_multi_epochs_loader"), False),
    **dict.fromkeys(("no_prefetcher", "no_resume_opt", "model_ema_force_cpu"), False),
    **dict.fromkeys(("aug_splits", "tta", "recovery_interval", "epoch_repeats", "local_rank"), 0),
    **dict.fromkeys(("start_epoch", "drop_connect"), None),
    "validation_batch_size_multiplier": 1,
}
IGNORED = ("checkpoint_hist",)  # one file for each sparsity is kept, and the last one


def read_config(path: str | Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Defaults of a YAML file. Raises ValueError for names and values that do not exist."""
    given = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    if not isinstance(given, dict):
        raise ValueError(f"{path}: not a mapping of options to values")
    known = {action.dest: action for action in parser._actions}
    for key in [key for key in given if key not in known]:
        if key in ABSENT and given[key] != ABSENT[key]:
            raise ValueError(f"{path}: {key}: {given[key]!r} is not supported; remove it")
        if key not in ABSENT and key not in IGNORED:
            raise ValueError(f"{path}: unknown option {key!r}{did_you_mean(key, known)}")
    found = {key: value for key, value in given.items() if key in known and value is not None}
    for key, value in found.items():
        if wanted := _wanted(known[key], value):
            raise ValueError(f"{path}: {key}: {value!r}; expected {wanted}")
    beside = Path(path).parent / str(found.get("recipe"))
    if beside.is_file():
        found["recipe"] = str(beside)
    return found


def _wanted(action: argparse.Action, value: Any) -> str:
    """What the option takes, if this value is something else."""
    if isinstance(action.default, Mapping):
        return "" if isinstance(value, Mapping) else "a mapping, such as {name: value}"
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        return "" if isinstance(value, bool) else "true or false"
    if action.nargs == "+" or isinstance(action.nargs, int):
        count = action.nargs if isinstance(action.nargs, int) else None
        if not isinstance(value, list) or count not in (None, len(value)):
            return f"a list of {count or 'values'}"
        return next((wrong for each in value if (wrong := _wanted_one(action, each))), "")
    return _wanted_one(action, value)


def _wanted_one(action: argparse.Action, value: Any) -> str:
    if action.choices is not None and value not in action.choices:
        known = ", ".join(map(repr, action.choices))
        return f"one of {known}{did_you_mean(str(value), action.choices)}"
    kind = action.type
    if kind not in (int, float):
        return ""
    try:
        number = float(value) if not isinstance(value, bool) else None
    except (TypeError, ValueError):
        number = None
    if number is None or (kind is int and number != int(number)):
        return "a whole number" if kind is int else "a number"
    return ""
