"""From a document to modifiers: a converter for each tag, and what concerns them together."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prunus.core.names import did_you_mean
from prunus.modifiers import ACDC, LearningRate, Modifier, MovementPruning, PruningModifier
from prunus.recipe.errors import RecipeError, Source
from prunus.recipe.sparseml.dialects import dialect_of
from prunus.recipe.sparseml.document import Entry, entries
from prunus.recipe.sparseml.learning_rates import function, learning_rate, set_learning_rate
from prunus.recipe.sparseml.parts import DIALECTS, Converter, Note, Part, Situation, interval, whole
from prunus.recipe.sparseml.pruning import acdc, constant, gradual, magnitude, movement
from prunus.recipe.sparseml.refused import REFUSED
from prunus.recipe.sparseml.second_order import cap, fast_cap, obs
from prunus.recipe.sparseml.settings import Settings, as_number
from prunus.recipe.sparseml.training import (
    Trainable,
    epoch_range,
    freezes,
    set_weight_decay,
    trainable_params,
)

log = logging.getLogger("prunus")
EPOCHS = ("start_epoch", "end_epoch")


def _nothing(settings: Settings, situation: Situation) -> Part:
    situation.ignore(settings, *settings.entry.settings)
    return Part()


CONVERTERS: dict[str, Converter] = {
    "EpochRangeModifier": epoch_range,
    "SetLearningRateModifier": set_learning_rate,
    "LearningRateModifier": learning_rate,
    "LearningRateFunctionModifier": function,
    "SetWeightDecayModifier": set_weight_decay,
    "TrainableParamsModifier": trainable_params,
    "ConstantPruningModifier": constant,
    "MagnitudePruningModifier": gradual(magnitude, together=False),
    "GMPruningModifier": gradual(magnitude, together=False),
    "LegacyGMPruningModifier": gradual(magnitude, together=False),
    "GlobalMagnitudePruningModifier": gradual(magnitude, together=True),
    "OBSPruningModifier": gradual(obs, together=True),
    "CAPruningModifier": gradual(cap, together=True),
    "FastCAPruningModifier": gradual(fast_cap, together=False),
    "MovementPruningModifier": gradual(movement, together=False, cls=MovementPruning),
    "ACDCPruningModifier": acdc,
    "SparsificationLoggingModifier": _nothing,  # prunus records its events itself
}


@dataclass(frozen=True)
class Reading:
    """A recipe of SparseML's or CAP's, understood."""

    modifiers: tuple[Modifier, ...]
    dialect: str
    max_epochs: float
    """the last epoch that any modifier names; -1 if none does"""
    min_epochs: float
    """the first one; -1 if all begin at once"""
    epochs: float | None
    """the length of training, where the recipe sets it"""
    notes: tuple[Note, ...] = ()
    """what has no counterpart or means something else, in the order of the file"""
    sampler: Mapping[str, Any] = field(default_factory=dict)
    """arguments for the loader that gradients are sampled from"""


def read(
    data: Any,
    source: Source,
    dialect: str | None = None,
    strict: bool = True,
    overrides: Mapping[str, Any] | None = None,
) -> Reading:
    """The modifiers of a parsed file.

    Raises RecipeError for what is wrong in it; with ``strict`` also for modifiers that prunus does
    not know the like of, which else are left out and noted.
    """
    if dialect is not None and dialect not in DIALECTS:
        raise ValueError(f"unknown dialect {dialect!r}{did_you_mean(dialect, DIALECTS)}")
    found = entries(data, overrides or {}, source)
    _refuse(found, source, strict)
    situation = Situation(dialect or dialect_of(found), dialect is not None, _last(found))
    if source.repeated:
        first, *_ = source.repeated
        keys = ", ".join(sorted({str(path[-1]) for path in source.repeated}))
        situation.notes.append(Note(first, f"keys stand twice, of which the last count: {keys}"))
    parts = [part for entry in found for part in _convert(entry, situation, source)]
    # of modifiers that begin together, one that acts for a while comes after one that stays
    parts = sorted(_together(parts, situation), key=lambda part: (part.start, part.end >= 0))
    situation.sum_up()
    ranges = any(entry.tag == "EpochRangeModifier" for entry in found)
    starts = [as_number(entry.settings.get(EPOCHS[0])) for entry in found]
    return Reading(
        tuple(_needed(parts)),
        situation.dialect,
        situation.last,
        min((float(s) for s in starts if s is not None and s >= 0), default=-1.0),
        whole(situation.last) if ranges and situation.last > 0 else None,
        tuple(situation.notes),
        situation.sampler,
    )


def _last(found: Sequence[Entry]) -> float:
    named = [as_number(entry.settings.get(key)) for entry in found for key in EPOCHS]
    return max((float(epoch) for epoch in named if epoch is not None), default=-1.0)


def _refuse(found: Sequence[Entry], source: Source, strict: bool) -> None:
    """Raises RecipeError for all modifiers that cannot be read, a line each."""
    lines = []
    for entry in found:
        if entry.tag in REFUSED and strict:
            message = f"!{entry.tag}: {REFUSED[entry.tag]}, or skip it with strict=False"
            lines.append(source.message(entry.path, message))
        elif entry.tag not in (*CONVERTERS, *REFUSED):
            hint = did_you_mean(entry.tag, [*CONVERTERS, *REFUSED])
            lines.append(source.message(entry.path, f"unknown modifier !{entry.tag}{hint}"))
    if lines:
        raise RecipeError("\n".join(lines))


def _convert(entry: Entry, situation: Situation, source: Source) -> Iterator[Part]:
    settings = Settings(entry, source)
    if entry.tag in REFUSED:
        situation.note(settings, f"skipped: {REFUSED[entry.tag]}")
        return
    situation.ignore(settings, "log_types")
    try:
        part = CONVERTERS[entry.tag](settings, situation)
    except RecipeError:
        raise
    except (ValueError, ArithmeticError) as error:  # of the dataclasses, and of extreme numbers
        raise settings.error(str(error)) from None
    settings.done()
    yield part


def _together(parts: Sequence[Part], situation: Situation) -> Iterator[Part]:
    """What follows from several modifiers: freezes, and rates that stay when a schedule ends."""
    yield from freezes([part for part in parts if isinstance(part, Trainable)])
    rates = [p for p in parts if any(isinstance(m, LearningRate) for m in p.modifiers)]
    for part in parts:
        if not isinstance(part, Trainable):
            yield part
        if part.settles is None or any(_takes_over(rate, part) for rate in rates):
            continue
        # else the loop's own rate, or one set before, would come back
        if part.end < situation.last or any(r.end < 0 and r.start < part.end for r in rates):
            rate, groups = part.settles
            stays = LearningRate(to=rate, window=interval(part.end), groups=groups)
            # right behind its schedule, so that rates which begin later have precedence
            part.modifiers.append(stays)


def _takes_over(rate: Part, part: Part) -> bool:
    """Whether the rate is in force when the part ends, in all groups of the part."""
    ending, going_on = _groups(part), _groups(rate)
    if going_on is not None and (ending is None or not ending <= going_on):
        return False
    if rate.end < 0:
        return part.start < rate.start <= part.end + 1e-9
    return rate.start <= part.end + 1e-9 < rate.end


def _groups(part: Part) -> set[int] | None:
    """The parameter groups whose learning rate the part sets; None for all."""
    (first, *_) = (m for m in part.modifiers if isinstance(m, LearningRate))
    return None if first.groups is None else set(first.groups)


def _needed(parts: Sequence[Part]) -> Iterator[Modifier]:
    """All modifiers but those that prune to what is pruned already: masks stay anyway."""
    done: list[tuple[float, PruningModifier]] = []
    for part in parts:
        for modifier in part.modifiers:
            if isinstance(modifier, PruningModifier) and not isinstance(modifier, ACDC):
                if any(0 <= end <= part.start and _reached(old, modifier) for end, old in done):
                    continue
                done.append((part.start if modifier.at_once else part.end, modifier))
            yield modifier


def _reached(old: PruningModifier, new: PruningModifier) -> bool:
    if not new.at_once or old.schedule is None or new.schedule is None:
        return False
    same = ("layers", "exclude", "pattern", "allocator")
    return (
        all(getattr(old, name) == getattr(new, name) for name in same)
        and type(old) is type(new)
        and old.pruner.name == new.pruner.name
        and old.schedule.final == new.schedule.final
    )


def log_notes(reading: Reading, source: Source) -> None:
    """One line for each: a warning where results depend on it."""
    for note in reading.notes:
        say = log.info if note.harmless else log.warning
        say("%s", source.message(note.path, note.text))
