"""The settings of one modifier, read with SparseML's leniency about types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prunus.core.names import did_you_mean
from prunus.core.numbers import is_finite
from prunus.recipe.errors import RecipeError, Source
from prunus.recipe.sparseml.document import Entry

REQUIRED: Any = object()
WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class Settings:
    """Settings taken out one by one; what nobody has asked for at the end is unknown.

    ``null`` stands for the default. Every method raises RecipeError, naming file, line and path,
    for a value that does not fit.
    """

    def __init__(self, entry: Entry, source: Source) -> None:
        self.entry, self.source = entry, source
        self.asked: set[str] = set()

    def error(self, message: str, name: str | None = None) -> RecipeError:
        path = self.entry.path if name is None else (*self.entry.path, name)
        return self.source.error(path, f"!{self.entry.tag}: {message}")

    def __contains__(self, name: str) -> bool:
        return self.entry.settings.get(name) is not None

    def any(self, name: str, default: Any = REQUIRED) -> Any:
        """The value as it stands."""
        self.asked.add(name)
        value = self.entry.settings.get(name)
        if value is None and default is REQUIRED:
            raise self.error(f"{name!r} is required")
        return default if value is None else value

    def number(self, name: str, default: Any = REQUIRED) -> Any:
        """A finite number, also one in quotes."""
        value = self.any(name, default)
        if value is default:
            return default
        number = as_number(value)
        if number is None:
            raise self.error(f"expected a number, not {value!r}", name)
        return number

    def integer(self, name: str, default: Any = REQUIRED) -> Any:
        """A whole number; ``1024.0`` is one."""
        value = self.number(name, default)
        if value is default:
            return default
        if value != int(value):
            raise self.error(f"expected a whole number, not {value!r}", name)
        return int(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.any(name, default)
        value = WORDS.get(value.lower(), value) if isinstance(value, str) else value
        if value in (0, 1):
            return bool(value)
        raise self.error(f"expected true or false, not {value!r}", name)

    def text(self, name: str, default: Any = REQUIRED) -> Any:
        value = self.any(name, default)
        if value is not default and not isinstance(value, str):
            raise self.error(f"expected text, not {value!r}", name)
        return value

    def choice(self, name: str, default: str, options: Sequence[str]) -> str:
        value: str = self.text(name, default)
        if value not in options:
            raise self.error(f"unknown {name} {value!r}{did_you_mean(value, options)}", name)
        return value

    def words(self, name: str, default: Any = REQUIRED) -> tuple[str, ...]:
        """A list of texts; a single one is a list of itself."""
        value = self.any(name, default)
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or not all(isinstance(i, str) for i in items):
            raise self.error(f"expected a list of names, not {value!r}", name)
        return tuple(items)

    def mapping(self, name: str) -> dict[str, Any]:
        value = self.any(name, {})
        if not isinstance(value, Mapping):
            raise self.error(f"expected a mapping, not {value!r}", name)
        return dict(value)

    def span(self, end: Any = -1.0) -> tuple[float, float]:
        """``start_epoch`` (never below 0) and ``end_epoch`` (-1: the end of training)."""
        begin = max(0.0, 0.0 + self.number("start_epoch", -1.0 if end != REQUIRED else REQUIRED))
        last = self.number("end_epoch", end)
        if 0 <= last < begin:
            raise self.error(f"end_epoch={last:g} comes before start_epoch={begin:g}", "end_epoch")
        return begin, last + 0.0 if last >= 0 else -1.0  # not -0.0

    def ignore(self, *names: str) -> list[str]:
        """Those of the names that were given; they count as known."""
        self.asked.update(names)
        return [name for name in names if name in self]

    def done(self) -> None:
        """Raises RecipeError if there is a setting that nobody has asked for."""
        for name in self.entry.settings:
            if name not in self.asked:
                raise self.error(f"unknown setting {name!r}{did_you_mean(name, self.asked)}", name)


def as_number(value: Any) -> float | int | None:
    """A finite number from itself or its text; None for anything else."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if is_finite(value) else None
