"""SparseML's and CAP's pruning modifiers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prunus.allocators import Allocator, Global, Uniform
from prunus.core.patterns import NM, Pattern
from prunus.modifiers import ACDC, Keep, PruningModifier
from prunus.modifiers.schedules import Schedule
from prunus.pruners import Magnitude, Pruner
from prunus.pruners.movement import Movement
from prunus.recipe.sparseml.mask_types import pattern_of
from prunus.recipe.sparseml.names import ALL_PRUNABLE, FROM_PARAM, patterns
from prunus.recipe.sparseml.parts import Converter, Part, Situation, build, interval, window
from prunus.recipe.sparseml.settings import Settings, as_number

INTERPOLATIONS = ("linear", "cubic", "inverse_cubic")
TOLERANCE = 1e-2
"""by how much SparseML lets a sparsity differ from that of N:M"""
PrunerOf = Callable[[Settings, Situation, Pattern], Pruner]


@dataclass(frozen=True)
class Ramp:
    """How sparse, and between which epochs."""

    init: float
    final: float
    start: float
    end: float
    every: float
    curve: str

    def arguments(self) -> dict[str, Any]:
        """``sparsity`` and ``window`` of `PruningModifier`."""
        if self.init >= self.final:
            when = window(self.start) if self.start > 0 else None
            return {"sparsity": self.final, "window": when}
        schedule = Schedule(from_=self.init, to=self.final, curve=self.curve)
        return {"sparsity": schedule, "window": window(self.start, self.end, self.every)}


def magnitude(settings: Settings, situation: Situation, pattern: Pattern) -> Pruner:
    kind = settings.text("score_type", "magnitude")
    if kind != "magnitude":
        raise settings.error(
            f"score_type {kind!r} has a modifier of its own; use that", "score_type"
        )
    if settings.flag("phased", False):
        raise settings.error("phased pruning is AC/DC; use !ACDCPruningModifier", "phased")
    return Magnitude()


def movement(settings: Settings, situation: Situation, pattern: Pattern) -> Pruner:
    return Movement()


def gradual(
    pruner_of: PrunerOf, together: bool, cls: type[PruningModifier] = PruningModifier
) -> Converter:
    """The converter of a modifier that prunes by this pruner; ``together``: in one ranking."""

    def convert(settings: Settings, situation: Situation) -> Part:
        start, end = settings.span()
        pattern = pattern_of(settings, situation)
        pruner = pruner_of(settings, situation, pattern)
        allocator = _allocator(settings, pruner, pattern, together)
        every = settings.number("update_frequency", -1.0)
        curve = settings.choice("inter_func", "cubic", INTERPOLATIONS)
        _leave_enabled(settings, situation, end)
        part, before = Part(start, end), tuple[str, ...]()
        for final, names in _targets(settings):
            init = _init(settings, situation, part, names, start)
            ramp = Ramp(init, final, start, end, every, curve)
            if isinstance(pattern, NM):
                when = _fixed(settings, ramp, pattern)
            else:
                _warn_of_falling(settings, situation, ramp)
                when = ramp.arguments()
            what = {"pruner": pruner, "pattern": str(pattern), "allocator": allocator}
            which = {"layers": names, "exclude": before}
            part.modifiers.append(build(cls, settings, **what, **which, **when))
            before += names
        return part

    return convert


def _allocator(
    settings: Settings, pruner: Pruner, pattern: Pattern, together: bool
) -> Allocator | None:
    """The allocator, if it is not the pruner's own."""
    whole = settings.flag("global_sparsity", together)
    wanted = Global() if whole else Uniform()
    return None if pattern.fixed is not None or wanted.name == pruner.allocator else wanted


def _leave_enabled(settings: Settings, situation: Situation, end: float) -> None:
    if not settings.flag("leave_enabled", True) and 0 <= end < situation.last:
        situation.note(
            settings,
            f"leave_enabled: false would let weights come back after epoch {end:g}; here they "
            "stay pruned to the end of training",
        )


def _targets(settings: Settings) -> list[tuple[float, tuple[str, ...]]]:
    """Final sparsities, each with the patterns it is for; of several the first one counts."""
    final, params = settings.any("final_sparsity"), settings.words("params", ())
    if not isinstance(final, dict):
        return [(settings.number("final_sparsity"), patterns(params or (ALL_PRUNABLE,), settings))]
    if params:
        raise settings.error("'params' must be [] where final_sparsity names them", "params")
    found = []
    for sparsity, names in final.items():
        value, words = as_number(sparsity), [names] if isinstance(names, str) else names
        if value is None or not isinstance(words, list):
            raise settings.error("expected sparsities, each with a list of names", "final_sparsity")
        found.append((float(value), patterns(words, settings, "final_sparsity")))
    return found


def _init(
    settings: Settings, situation: Situation, part: Part, names: tuple[str, ...], start: float
) -> float:
    if settings.any("init_sparsity") != FROM_PARAM:
        return float(settings.number("init_sparsity"))
    begin = interval(start) if start > 0 else None
    part.modifiers.append(Keep(names, window=begin, allow_dense=True))
    message = "what is zero is held, and targets below that change nothing"
    situation.note(settings, f"init_sparsity {FROM_PARAM} is read as 0: {message}", harmless=True)
    return 0.0


def _warn_of_falling(settings: Settings, situation: Situation, ramp: Ramp) -> None:
    if ramp.final < ramp.init:
        situation.note(
            settings,
            f"final_sparsity {ramp.final:g} is below init_sparsity {ramp.init:g}, and pruned "
            f"weights do not come back: {ramp.final:g} is pruned at once",
        )


def _fixed(settings: Settings, ramp: Ramp, pattern: NM) -> dict[str, Any]:
    """Arguments for N:M, which is pruned in one step."""
    if abs(ramp.final - pattern.fixed) > TOLERANCE:
        message = f"{ramp.final:g} is not the sparsity of {pattern} ({pattern.fixed:g})"
        raise settings.error(f"final_sparsity {message}; write that", "final_sparsity")
    if 0 < ramp.init < pattern.fixed - TOLERANCE:
        raise settings.error(
            f"N:M has one sparsity; set init_sparsity to {pattern.fixed:g} too, or to 0 to prune "
            "at end_epoch",
            "init_sparsity",
        )
    start = ramp.end if ramp.init == 0 and ramp.end >= 0 else ramp.start
    return {"window": window(start) if start > 0 else None}


def constant(settings: Settings, situation: Situation) -> Part:
    start, end = settings.span()
    settings.ignore("update_frequency")
    names = patterns(settings.words("params"), settings)
    if 0 <= end < situation.last:
        situation.note(settings, f"zeros stay zero after epoch {end:g} too", harmless=True)
    return Part(start, end, [Keep(names, window=interval(start) if start > 0 else None)])


def acdc(settings: Settings, situation: Situation) -> Part:
    start, end = settings.span()
    pattern = pattern_of(settings, situation)
    _leave_enabled(settings, situation, end)
    modifier = build(
        ACDC,
        settings,
        sparsity=None if pattern.fixed is not None else settings.number("compression_sparsity"),
        layers=patterns(settings.words("params"), settings),
        pattern=str(pattern),
        allocator=_allocator(settings, Magnitude(), pattern, together=True),
        window=window(start, end, settings.number("update_frequency")),
        reset_momentum=settings.flag("momentum_buffer_reset", True),
    )
    settings.ignore("compression_sparsity")
    return Part(start, end, [modifier])
