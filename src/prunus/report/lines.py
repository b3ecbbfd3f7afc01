"""Events as lines of strict JSON, and back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

Event = dict[str, Any]
UNNUMBERED = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
MAX_TIME = 253_402_300_799
"""the last second that a date is made of"""
REQUIRED: dict[str, dict[str, type]] = {
    "prune": {"layers": dict, "sizes": dict, "saved": dict, "sparsity": float, "pruner": str},
    "sweep": {"layers": dict, "sizes": dict, "saved": dict, "sparsity": float, "values": dict},
    "execution": {"layers": list},
    "cut": {"layers": list},
}


def to_line(event: Mapping[str, Any]) -> str:
    """The event in one line; NaN and infinities, which JSON does not know, as their names.

    >>> to_line({"event": "metrics", "step": 1, "loss": math.nan})
    '{"event": "metrics", "step": 1, "loss": "NaN"}'
    """
    return json.dumps(_named(event), allow_nan=False)


def from_line(line: str) -> Event:
    """The event of a line. Raises ValueError for what is none."""
    event = _numbered(json.loads(line))
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        raise ValueError("no event")
    if type(event.get("step")) is not int or not 0 <= event["step"] <= 2**53:
        raise ValueError("no step")
    if not 0 <= _number(event.get("time", 0.0)) <= MAX_TIME:
        raise ValueError("no time")
    for key, kind in REQUIRED.get(event["event"], {}).items():
        value = event.get(key)
        if not (math.isfinite(_number(value)) if kind is float else isinstance(value, kind)):
            raise ValueError(f"no {key}")
    return event


def _number(value: Any) -> float:
    return float(value) if type(value) in (int, float) else math.nan


def _named(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _named(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_named(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"
    return value


def _numbered(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbered(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbered(item) for item in value]
    return UNNUMBERED.get(value, value) if isinstance(value, str) else value
