"""Fields of modifiers as a recipe's YAML makes them, whatever Python was given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prunus.modifiers.timing import Interval

_TUPLES = ("layers", "exclude", "parameters", "structure", "groups")


def as_in_recipes(modifier: Any, window: type[Interval] = Interval) -> None:
    """Tuples where names are listed, and a window of the class that the entry has.

    So that a modifier equals the one which its YAML reads into. Raises ValueError for a window
    that does not go with the entry, and for names that are no text.
    """
    for name in _TUPLES:
        value = getattr(modifier, name, None)
        if isinstance(value, str):
            value = (value,)
        elif isinstance(value, Sequence):
            value = tuple(value)
        if name in ("layers", "exclude", "parameters"):
            for item in value or ():
                if not isinstance(item, str):
                    message = f"{name} takes names, not {item!r}; write such as 'blocks.*'"
                    raise ValueError(message)
        if hasattr(modifier, name):
            object.__setattr__(modifier, name, value)
    object.__setattr__(modifier, "window", window.of(modifier.window))
