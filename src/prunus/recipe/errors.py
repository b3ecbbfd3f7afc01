"""The one error a recipe can raise, and the places it can name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Path = tuple[str | int, ...]


def dotted(path: Path) -> str:
    """``("modifiers", 0, "prune")`` -> ``modifiers[0].prune``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


class RecipeError(ValueError):
    """Something in a recipe is wrong; the message begins with file, line and path."""


@dataclass
class Source:
    """Where a recipe came from, and the line of each path in it."""

    name: str
    lines: Mapping[Path, int] = field(default_factory=dict)
    repeated: Mapping[Path, int] = field(default_factory=dict)
    """keys that stand twice in the same mapping, with the line of the second"""

    def refuse_repeated(self) -> None:
        """Raises RecipeError if a key stands twice."""
        for path, line in self.repeated.items():
            key = path[-1]
            raise RecipeError(f"{self.name}:{line}: {key!r} stands twice in the same mapping")

    def line(self, path: Path) -> int | None:
        for end in range(len(path), -1, -1):
            if path[:end] in self.lines:
                return self.lines[path[:end]]
        return None

    def message(self, path: Path, message: str) -> str:
        """The message behind file, line and path."""
        line = self.line(path)
        where = [self.name + (f":{line}" if line else ""), dotted(path)]
        return ": ".join([part for part in where if part] + [message])

    def error(self, path: Path, message: str) -> RecipeError:
        return RecipeError(self.message(path, message))
