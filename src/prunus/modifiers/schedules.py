"""Schedules: values that follow progress in [0, 1].

A curve is a plain function on [0, 1] with ``curve(0) = 0`` and ``curve(1) = 1``; a `Schedule`
stretches it between two values: ``from + (to - from) * curve(progress)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from prunus.core.names import did_you_mean
from prunus.core.numbers import is_finite, shortened
from prunus.modifiers.timing import parse_duration


def linear(t: float) -> float:
    return t


def cubic(t: float) -> float:
    """Fast first, slow last (Zhu and Gupta, "To prune, or not to prune", 2017, eq. 1)."""
    return 1 - (1 - t) ** 3


def inverse_cubic(t: float) -> float:
    """Slow first, fast last; SparseML's ``inter_func: inverse_cubic``."""
    return 1 - math.pow(1 - t, 1 / 3)


def cosine(t: float) -> float:
    """Half a cosine wave (Loshchilov and Hutter, "SGDR", 2017, eq. 5)."""
    return (1 - math.cos(math.pi * t)) / 2


def constant(t: float) -> float:
    return 1.0


def cyclic(curve: Callable[[float], float], t: float, cycle: float) -> float:
    """The curve over and over, each time within `cycle` of the progress; the end is an end."""
    if t >= 1:
        return curve(1.0)
    # the same instant computed from two roundings must not fall into two different cycles
    return curve(min(1.0, math.fmod(t + 1e-9, cycle) / cycle))


def steps(values: tuple[float, ...], at: tuple[float, ...], t: float) -> float:
    """The last of `values` whose time in `at` has come; the last value at the very end."""
    if t >= 1:
        return values[-1]
    due = [value for value, begin in zip(values, at, strict=True) if begin <= t + 1e-9]
    return due[-1]


CURVES: dict[str, Callable[[float], float]] = {
    "constant": constant,
    "linear": linear,
    "cubic": cubic,
    "inverse_cubic": inverse_cubic,
    "cosine": cosine,
}


@dataclass(frozen=True)
class Schedule:
    """A value that changes over a window."""

    from_: float | None = None
    """value at the beginning of the window"""
    to: float | None = None
    """value at its end"""
    curve: str | None = None
    """constant, linear, cubic, inverse_cubic, cosine, cyclic or steps; default: linear, or
    constant without `from`, or steps with `values`; cyclic is cosine with restarts"""
    values: tuple[float, ...] = ()
    """for steps: one value after the other"""
    at: tuple[float, ...] = ()
    """for steps: the progress in [0, 1] at which each value begins; default: equal parts"""
    cycle: str | None = None
    """start the curve anew every `cycle`, such as '5ep'"""

    def __post_init__(self) -> None:
        for name in ("values", "at"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        names = [*CURVES, "cyclic", "steps"]
        for value in (*self.extremes, *self.at):
            if not is_finite(value):
                raise ValueError(f"{shortened(value)} is no finite number; a schedule needs one")
        if self.kind not in names:
            raise ValueError(f"unknown curve {self.kind!r}{did_you_mean(self.kind, names)}")
        if self.kind == "steps":
            self._check_steps()
        elif self.values or self.at:
            raise ValueError(f"'values' and 'at' belong to curve 'steps', not to {self.kind!r}")
        elif self.to is None:
            raise ValueError("a schedule needs 'to', its value at the end")
        elif self.from_ is None and self.kind != "constant":
            raise ValueError(f"curve {self.kind!r} needs 'from', its value at the beginning")
        if self.cycle is not None and parse_duration(self.cycle)[0] == 0:
            raise ValueError(f"cycle={self.cycle!r} never moves on; give a positive duration")
        if self.cycle is not None and self.kind in ("constant", "steps"):
            raise ValueError(f"'cycle' means nothing to curve {self.kind!r}; drop it")
        if self.kind == "cyclic" and self.cycle is None:
            raise ValueError("curve 'cyclic' needs 'cycle', such as '5ep'")

    def _check_steps(self) -> None:
        if not self.values:
            raise ValueError("curve 'steps' needs 'values', a list of numbers")
        if self.from_ is not None or self.to is not None:
            raise ValueError("curve 'steps' takes 'values', not 'from' and 'to'")
        if self.at and len(self.at) != len(self.values):
            raise ValueError(f"'at' has {len(self.at)} entries for {len(self.values)} 'values'")
        if self.at and (list(self.at) != sorted(self.at) or self.at[0] != 0 or self.at[-1] > 1):
            raise ValueError(f"'at' must rise from 0 and stay within 1, not {list(self.at)}")

    @property
    def kind(self) -> str:
        if self.curve is not None:
            return self.curve
        if self.values:
            return "steps"
        return "constant" if self.from_ is None else "linear"

    @property
    def final(self) -> float:
        if self.to is None:
            return self.values[-1]
        return self.to

    @property
    def extremes(self) -> tuple[float, ...]:
        """Values between which all others lie."""
        return self.values or tuple(v for v in (self.from_, self.to) if v is not None)

    def __call__(self, progress: float, cycle: float | None = None) -> float:
        """The value at `progress`; `cycle` is the cycle's length as a share of the window."""
        t = min(1.0, max(0.0, progress))
        if self.kind == "steps":
            even = tuple(i / len(self.values) for i in range(len(self.values)))
            return steps(self.values, self.at or even, t)
        curve = CURVES["cosine" if self.kind == "cyclic" else self.kind]
        share = cyclic(curve, t, cycle) if cycle else curve(t)
        if self.from_ is None or share == 1:
            return self.final
        return self.from_ + (self.final - self.from_) * share
