"""What a converted modifier consists of, and the words converters share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from prunus.modifiers import Modifier
from prunus.modifiers.timing import Interval, Window
from prunus.recipe.errors import Path
from prunus.recipe.sparseml.settings import Settings

SPARSEML, CAP = "sparseml", "cap"
DIALECTS = (SPARSEML, CAP)


@dataclass(frozen=True)
class Note:
    """Something in the file that has no counterpart here, or means something else."""

    path: Path
    text: str
    harmless: bool = False
    """whether results do not depend on it"""


@dataclass
class Part:
    """What one modifier of the file has become."""

    start: float = 0.0
    end: float = -1.0
    modifiers: list[Modifier] = field(default_factory=list)
    settles: tuple[float, tuple[int, ...] | None] | None = None
    """the learning rate that stays after the end, and the parameter groups it is for"""


@dataclass
class Situation:
    """What converters need to know of the whole recipe, and where they leave their notes."""

    dialect: str
    named: bool = False
    """whether the user has named the dialect"""
    last: float = -1.0
    """the last epoch that any modifier names"""
    notes: list[Note] = field(default_factory=list)
    ignored: dict[str, None] = field(default_factory=dict)
    sampler: dict[str, Any] = field(default_factory=dict)
    """``grad_sampler_kwargs`` of all modifiers together"""

    def note(self, settings: Settings, text: str, harmless: bool = False) -> None:
        self.notes.append(Note(settings.entry.path, f"!{settings.entry.tag}: {text}", harmless))

    def ignore(self, settings: Settings, *names: str) -> None:
        """Take settings that change no result; `sum_up` notes those that were given."""
        self.ignored.update(dict.fromkeys(settings.ignore(*names)))

    def sum_up(self) -> None:
        if self.ignored:
            text = f"ignored, because no result depends on it: {', '.join(self.ignored)}"
            self.notes.append(Note((), text, harmless=True))


Converter = Callable[[Settings, Situation], Part]


def whole(number: float) -> float:
    """The integer where it is one, which reads better in a recipe."""
    return int(number) if number == int(number) else number


def duration(epochs: float) -> str:
    """Epochs as a duration: ``2.5`` -> ``2.5ep``, never with an exponent."""
    return f"{epochs:.9f}".rstrip("0").rstrip(".") + "ep"


def window(start: float, end: float = -1.0, every: float | None = None) -> Window:
    """The window between two epochs; ``end`` -1 is the end of training, ``every`` -1 each step."""
    frequency = None
    if every is not None:
        frequency = duration(every) if every > 0 else "1step"
    return Window(duration(start), duration(end) if end >= 0 else None, frequency)


def interval(start: float, end: float = -1.0) -> Interval:
    """The same for what acts at every step."""
    return Interval(duration(start), duration(end) if end >= 0 else None)


def build(cls: type, settings: Settings, **values: Any) -> Any:
    """The dataclass, its complaints told with file, line and path."""
    try:
        return cls(**values)
    except ValueError as error:
        raise settings.error(str(error)) from None
