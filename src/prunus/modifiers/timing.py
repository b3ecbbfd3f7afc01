"""When: durations such as ``3ep``, ``500step`` and ``40%``, and windows of training.

A time is a number of optimizer steps already done. The dataclasses keep what the user wrote;
`Timeline` turns it into steps once the length of training is known.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, TypeVar

from prunus.core.numbers import MAX_STEPS, count, is_finite, shortened

MAX_TICKS = 10_000_000
_DURATION = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(epochs?|ep|steps?|%)")
_UNITS = {"epoch": "ep", "epochs": "ep", "ep": "ep", "step": "step", "steps": "step", "%": "%"}


def parse_duration(text: str) -> tuple[float, str]:
    """``"3ep"`` -> ``(3.0, "ep")``; the units are ``ep``, ``step`` and ``%`` (of all training).

    Raises ValueError for anything else, naming the three forms.
    """
    match = _DURATION.fullmatch(str(text).strip())
    if match is None:
        message = f"{shortened(text)!r} is not a duration; write '3ep', '500step' or '40%'"
        raise ValueError(message)
    if float(match[1]) > MAX_STEPS:
        raise ValueError(f"{shortened(text)!r} is longer than any training")
    value, unit = float(match[1]), _UNITS[match[2]]
    if unit == "step" and value != int(value):
        raise ValueError(f"{text!r}: steps are whole; write '{round(value)}step'")
    if unit == "%" and value > 100:
        raise ValueError(f"{text!r} is past the end of training; write at most '100%'")
    return value, unit


def check_epochs(epochs: float) -> None:
    """Raises ValueError for what is no length of training."""
    if isinstance(epochs, bool) or not is_finite(epochs) or not 0 < epochs <= MAX_STEPS:
        raise ValueError(f"epochs={shortened(epochs)}; give a positive number")


@dataclass(frozen=True)
class Timeline:
    """How long training is, in optimizer steps.

    ``steps_per_epoch`` counts optimizer steps (batches divided by gradient accumulation).
    """

    steps_per_epoch: int | None = None
    epochs: float | None = None

    def __post_init__(self) -> None:
        if self.steps_per_epoch is not None:
            whole = count("steps_per_epoch", self.steps_per_epoch)
            object.__setattr__(self, "steps_per_epoch", whole)
        if self.epochs is not None:
            check_epochs(self.epochs)
        if self.total is not None and self.total > MAX_STEPS:
            raise ValueError(f"epochs={self.epochs} is longer than any training")

    @property
    def total(self) -> int | None:
        """All optimizer steps, or None if attach was not told."""
        if self.steps_per_epoch is None or self.epochs is None:
            return None
        return round(self.steps_per_epoch * self.epochs)

    def steps(self, duration: str) -> int:
        """The duration in optimizer steps. Raises ValueError naming the argument that lacks."""
        value, unit = parse_duration(duration)
        if unit == "step":
            return int(value)
        if unit == "ep":
            if self.steps_per_epoch is None:
                raise ValueError(f"{duration!r} counts epochs; give attach steps_per_epoch=")
            return round(value * self.steps_per_epoch)
        if self.total is None:
            raise ValueError(
                f"{duration!r} is a share of training; give attach steps_per_epoch= and epochs="
            )
        return round(value / 100 * self.total)

    def cycle(self, duration: str, span: int) -> float:
        """The duration as a share of `span` steps.

        Cycles that fill the span but for what rounding to whole steps takes, fill it exactly; else
        a last cycle of a step or two would begin.
        """
        steps = max(1, self.steps(duration))
        count = max(1, round(span / steps))
        return 1 / count if abs(span - count * steps) <= count else steps / max(1, span)


_I = TypeVar("_I", bound="Interval")


@dataclass(frozen=True)
class Interval:
    """The part of training in which a modifier acts, at every step.

    >>> from prunus.modifiers.timing import Timeline
    >>> prunus.Interval(from_="1ep").bounds(Timeline(steps_per_epoch=10, epochs=5))
    (10, None)
    """

    from_: str = "0ep"
    """when it begins"""
    to: str | None = None
    """when it is complete; default: the end of training"""

    def __post_init__(self) -> None:
        for duration in (self.from_, self.to):
            if duration is not None:
                parse_duration(duration)

    @classmethod
    def of(cls: type[_I], window: Any) -> _I | None:
        """The window as one of this class, as a recipe's YAML would have made it; None stays.

        Raises ValueError for one with an ``every`` that this class has not, and for what is none.
        """
        if window is None or type(window) is cls:
            return window
        if not isinstance(window, Interval):
            message = f"window={window!r}; give prunus.{cls.__name__}(from_='1ep', to='3ep')"
            raise ValueError(message)
        if not issubclass(cls, Window) and getattr(window, "every", None) is not None:
            raise ValueError(
                f"the window's every={window.every!r} means nothing in an entry that acts at every "  # type: ignore[attr-defined]
                "step; drop it"
            )
        return cls(window.from_, window.to)

    def bounds(self, timeline: Timeline) -> tuple[int, int | None]:
        """First and last step, without a last one where it lasts as long as training."""
        if self.to is None:
            return self.begin(timeline), None
        return self.span(timeline)

    def begin(self, timeline: Timeline) -> int:
        return 0 if parse_duration(self.from_)[0] == 0 else timeline.steps(self.from_)

    def span(self, timeline: Timeline) -> tuple[int, int]:
        """First and last step. Raises ValueError if the window is empty or its end unknown."""
        begin = self.begin(timeline)
        end = timeline.total if self.to is None else timeline.steps(self.to)
        if end is None:
            raise ValueError(
                "the window has no end; give it 'to', or give attach steps_per_epoch= and epochs="
            )
        if end < begin:
            raise ValueError(f"the window ends (step {end}) before it begins (step {begin})")
        return begin, end


@dataclass(frozen=True)
class Window(Interval):
    """The part of training in which a modifier acts, and how often.

    >>> from prunus.modifiers.timing import Timeline
    >>> window = prunus.Window(from_="1ep", to="3ep", every="1ep")
    >>> window.ticks(Timeline(steps_per_epoch=10, epochs=5))
    [10, 20, 30]
    """

    every: str | None = None
    """time between two pruning steps; default: one epoch"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every is not None and parse_duration(self.every)[0] == 0:
            raise ValueError(f"every={self.every!r} never moves on; give a positive duration")

    def ticks(self, timeline: Timeline) -> list[int]:
        """The steps after which to prune, the last one always the window's end."""
        begin, end = self.span(timeline)
        every = max(1, timeline.steps(self.every or "1ep")) if end > begin else 1
        if (end - begin) // every > MAX_TICKS:
            raise ValueError(
                f"{(end - begin) // every:,} pruning steps; give the window a longer 'every'"
            )
        ticks = list(range(begin, end, every))
        # a stub of a period before the end would prune twice in a row, with nothing learnt between
        if len(ticks) > 1 and end - ticks[-1] < every / 2:
            ticks.pop()
        return [*ticks, end]
