"""SparseML's and CAP's modifiers of the learning rate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from prunus.core.numbers import is_finite
from prunus.modifiers import LearningRate
from prunus.modifiers.schedules import CURVES
from prunus.recipe.sparseml.parts import CAP, Part, Situation, build, duration, interval
from prunus.recipe.sparseml.settings import REQUIRED, Settings, as_number

MAX_PIECES = 10_000
"""of a schedule; more are a slip, not a schedule"""
SCHEDULERS = ("StepLR", "MultiStepLR", "ExponentialLR", "CosineAnnealingWarmRestarts")


def groups(settings: Settings) -> tuple[int, ...] | None:
    """Numbers of parameter groups; none given, or an empty list, are all of them."""
    value = settings.any("param_groups", None)
    if value is None:
        return None
    if not isinstance(value, list) or any(type(i) is not int for i in value):
        raise settings.error(f"expected a list of numbers, not {value!r}", "param_groups")
    return tuple(value) or None


def constants(
    settings: Settings,
    values: Sequence[tuple[float, float]],
    end: float = -1.0,
    chosen: tuple[int, ...] | None = None,
) -> Part:
    """Learning rates and the epochs from which on they count; the last one stays."""
    part = Part(values[0][0], end)
    for start, rate in values:
        when = interval(start) if start > 0 else None
        part.modifiers.append(build(LearningRate, settings, to=rate, window=when, groups=chosen))
    return part


def set_learning_rate(settings: Settings, situation: Situation) -> Part:
    start, _ = settings.span()
    situation.ignore(settings, "constant_logging")
    chosen = groups(settings)
    return constants(settings, [(start, settings.number("learning_rate"))], chosen=chosen)


def learning_rate(settings: Settings, situation: Situation) -> Part:
    """torch's schedulers, with steps, milestones and cycles counted in epochs."""
    start, end = settings.span()
    first, kind = settings.number("init_lr"), settings.text("lr_class")
    keywords = settings.mapping("lr_kwargs")
    settings.ignore("update_frequency")
    situation.ignore(settings, "constant_logging")
    if kind == "MultiStepLR":
        part = _milestones(settings, situation, keywords, first, start, end)
    elif kind == "CosineAnnealingWarmRestarts":
        part = _restarts(settings, keywords, first, start, end)
    elif kind in ("StepLR", "ExponentialLR"):
        size = 1.0 if kind == "ExponentialLR" else _keyword(settings, keywords, "step_size")
        end = _end(settings, situation, start, end)
        values = _stairs(first, _keyword(settings, keywords, "gamma"), size, end - start)
        part = Part(start, end, [LearningRate(window=interval(start, end), **values)])
    else:
        raise settings.error(f"unknown lr_class {kind!r}; use {', '.join(SCHEDULERS)}", "lr_class")
    if keywords:
        raise settings.error(f"unknown lr_kwargs: {', '.join(keywords)}", "lr_kwargs")
    return part


def _milestones(
    settings: Settings,
    situation: Situation,
    keywords: dict[str, Any],
    first: float,
    start: float,
    end: float,
) -> Part:
    factor, marks = _keyword(settings, keywords, "gamma"), keywords.pop("milestones", None)
    if not isinstance(marks, list) or not all(map(_is_epoch, marks)):
        raise settings.error(f"milestones={marks!r}; give a list of epochs", "lr_kwargs")
    if late := [m for m in sorted(marks) if 0 <= end <= m]:
        situation.note(settings, f"left out: milestones {late}, which end_epoch={end:g} cuts off")
    at = [start, *(m for m in sorted(marks) if m not in late)]
    return constants(settings, [(e, first * factor**i) for i, e in enumerate(at)], end)


def _is_epoch(value: Any) -> bool:
    return type(value) in (int, float) and is_finite(value)


def _restarts(
    settings: Settings, keywords: dict[str, Any], first: float, start: float, end: float
) -> Part:
    if (growth := keywords.pop("T_mult", 1)) != 1:
        remedy = "write a modifier for each cycle"
        raise settings.error(f"T_mult={growth!r}: cycles cannot grow; {remedy}", "lr_kwargs")
    cycle = duration(_keyword(settings, keywords, "cycle_epochs"))
    ends = {"from_": first, "to": _keyword(settings, keywords, "lr_min"), "curve": "cosine"}
    rate = build(LearningRate, settings, window=interval(start, end), cycle=cycle, **ends)
    return Part(start, end, [rate])


def _keyword(settings: Settings, keywords: dict[str, Any], name: str) -> float:
    value = keywords.pop(name, None)
    number = None if isinstance(value, str) else as_number(value)
    if number is None:
        raise settings.error(f"lr_kwargs needs the number {name!r}, not {value!r}", "lr_kwargs")
    return float(number)


def _end(settings: Settings, situation: Situation, start: float, end: float) -> float:
    """The end of training where the modifier names none."""
    last = end if end >= 0 else situation.last
    if last <= start:
        raise settings.error("end_epoch must come after start_epoch; give it a number", "end_epoch")
    return last


def _stairs(first: float, factor: float, size: float, span: float) -> dict[str, Any]:
    """Settings of a schedule that is multiplied by the factor every `size` epochs."""
    count = max(1, -int(-(span - 1e-9) // size)) if size > 0 else MAX_PIECES + 1
    if count > MAX_PIECES:
        raise ValueError(f"a step of {size:g} epochs in {span:g} is too short; give a longer one")
    at = tuple(min(1.0, i * size / span) for i in range(count))
    return {"values": tuple(first * factor**i for i in range(count)), "at": at}


def function(settings: Settings, situation: Situation) -> Part:
    """`LearningRateFunctionModifier`, whose cycles the dialects see differently."""
    start, end = settings.span(end=REQUIRED)
    end = _end(settings, situation, start, end)
    settings.ignore("update_frequency")
    situation.ignore(settings, "constant_logging")
    first, last = settings.number("init_lr"), settings.number("final_lr")
    kind, cycle = settings.text("lr_func"), settings.number("cycle_epochs", -1.0)
    chosen, cap = groups(settings), situation.dialect == CAP
    pieces = (_cap if cap else _sparseml)(settings, situation, kind, cycle, end - start)
    part = Part(start, end)
    for begin, stop, factor, values in pieces:
        ends = {} if "to" in values or "values" in values else {"from_": first, "to": last}
        scaled = {key: _scaled(key, v, factor) for key, v in {**ends, **values}.items()}
        when = interval(start + begin, start + stop)
        part.modifiers.append(build(LearningRate, settings, window=when, groups=chosen, **scaled))
    part.settles = (scaled["values"][-1] if "values" in scaled else scaled["to"], chosen)
    return part


def _scaled(key: str, value: Any, factor: float) -> Any:
    if key == "values":
        return tuple(v * factor for v in value)
    return value * factor if key in ("from_", "to") else value


Piece = tuple[float, float, float, dict[str, Any]]
"""begin and end in epochs after the start, a factor, and settings of the schedule"""


def _sparseml(
    settings: Settings, situation: Situation, kind: str, cycle: float, span: float
) -> Iterator[Piece]:
    if kind not in ("linear", "cosine", "cyclic_linear"):
        remedy = "use linear, cosine or cyclic_linear"
        if kind == "step":
            remedy = "CAP does: load the recipe with dialect='cap'"
        raise settings.error(f"SparseML knows no lr_func {kind!r}; {remedy}", "lr_func")
    if kind != "cyclic_linear":
        if 0 < cycle < span and cycle != 1 and not situation.named:  # which SparseML writes itself
            remedy = "in CAP's recipes it does: load them with dialect='cap'"
            situation.note(settings, f"cycle_epochs does nothing to lr_func {kind!r}; {remedy}")
        yield 0, span, 1, {"curve": kind}
        return
    cycle = min(cycle if cycle > 0 else 1.0, span)
    whole = int(span / cycle + 1e-9) * cycle
    yield 0, whole, 1, {"curve": "linear", **_cycle(cycle, whole)}
    if span - whole > 1e-9:  # the last cycle is squeezed into what is left
        yield whole, span, 1, {"curve": "linear"}


def _cycle(cycle: float, span: float) -> dict[str, Any]:
    return {"cycle": duration(cycle)} if cycle < span - 1e-9 else {}


def _cap(
    settings: Settings, situation: Situation, kind: str, cycle: float, span: float
) -> Iterator[Piece]:
    factor, warmup = settings.number("cycle_mul", 1.0), settings.number("warmup", 0.0)
    if warmup > 0:
        raise settings.error("warmup has no counterpart; put a linear modifier before", "warmup")
    cycle = min(cycle, span) if cycle > 0 else span
    count = int(span / cycle + 1e-9)
    if count > MAX_PIECES:
        raise ValueError(f"cycle_epochs={cycle:g} is too short for {span:g} epochs")
    rest = span - count * cycle
    values, still = _cap_cycle(settings, kind, cycle, rest)
    if factor == 1 and "values" not in values:
        yield 0, count * cycle, 1, {**values, **_cycle(cycle, count * cycle)}
    else:
        for i in range(count):
            yield i * cycle, (i + 1) * cycle, factor**i, values
    if rest > 1e-9:  # CAP stands still in what is left
        yield count * cycle, span, factor**count, {"to": still}


def _cap_cycle(
    settings: Settings, kind: str, cycle: float, rest: float
) -> tuple[dict[str, Any], float]:
    """The schedule of one cycle, and its value after `rest` epochs."""
    first, last = settings.number("init_lr"), settings.number("final_lr")
    rate, size = settings.number("decay_rate", 0.9), settings.number("decay_epochs", 1.0)
    if kind in ("linear", "cosine"):
        return {"curve": kind}, first + (last - first) * CURVES[kind](rest / cycle)
    if kind != "step":
        raise settings.error(f"no lr_func {kind!r} here; use linear, cosine or step", "lr_func")
    values = _stairs(first, rate, size, cycle)
    values["values"] = tuple(max(last, v) for v in values["values"])
    return values, max(last, first * rate ** int(rest / size + 1e-9))
