"""The length of training, weight decay, and which parameters are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prunus.modifiers import Freeze, WeightDecay
from prunus.recipe.sparseml.learning_rates import groups
from prunus.recipe.sparseml.names import ALL, ALL_PRUNABLE, patterns
from prunus.recipe.sparseml.parts import Part, Situation, build, interval
from prunus.recipe.sparseml.settings import REQUIRED, Settings


def epoch_range(settings: Settings, situation: Situation) -> Part:
    return Part(*settings.span(end=REQUIRED))


def set_weight_decay(settings: Settings, situation: Situation) -> Part:
    start, _ = settings.span()
    situation.ignore(settings, "constant_logging")
    decay, chosen = settings.number("weight_decay"), groups(settings)
    when = interval(start) if start > 0 else None
    return Part(start, -1, [build(WeightDecay, settings, to=decay, window=when, groups=chosen)])


@dataclass
class Trainable(Part):
    """`TrainableParamsModifier`: becomes entries of ``freeze`` together with the others."""

    trainable: bool = True
    parameters: tuple[str, ...] = ()

    def at(self, epoch: float) -> bool:
        return self.start <= epoch and (self.end < 0 or epoch < self.end)


def trainable_params(settings: Settings, situation: Situation) -> Part:
    start, end = settings.span()
    words = settings.words("params")
    if ALL_PRUNABLE in words:
        remedy = f"name them, such as 're:.*weight', or write {ALL} for all parameters"
        raise settings.error(f"{ALL_PRUNABLE} is read for pruning only; {remedy}", "params")
    names = patterns(words, settings, weights=False)
    if not settings.flag("params_strict", True) and all(n.startswith("re:") for n in names):
        names = ("re:" + "|".join(name.removeprefix("re:") for name in names),)
    trainable = settings.flag("trainable", True)
    return Trainable(start, end, trainable=trainable, parameters=names)


def freezes(parts: Sequence[Trainable]) -> list[Part]:
    """What is frozen, cut wherever parameters in between are made trainable again."""
    thaws = [part for part in parts if part.trainable]
    done = []
    for part in parts:
        if part.trainable:
            continue
        cuts = {part.start, *(e for thaw in thaws for e in (thaw.start, thaw.end) if part.at(e))}
        begins = sorted(cuts)
        for begin, stop in zip(begins, [*begins[1:], part.end], strict=True):
            spared = [name for thaw in thaws if thaw.at(begin) for name in thaw.parameters]
            when = interval(begin, stop) if begin > 0 or stop >= 0 else None
            freeze = Freeze(part.parameters, tuple(dict.fromkeys(spared)), when)
            done.append(Part(begin, stop, [freeze]))
    return done
