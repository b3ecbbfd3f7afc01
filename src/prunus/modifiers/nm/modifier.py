"""The recipe entry ``nm_training``: masks chosen anew at every step, and weights that come back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from prunus.allocators import Uniform
from prunus.calibration.calibration import Calibration
from prunus.core.names import check_choice
from prunus.core.patterns import Pattern, parse_pattern
from prunus.core.selection import select
from prunus.engine.fitting import MISFITS, Misfits
from prunus.engine.method import Method
from prunus.engine.plan import PruningPlan, first_pass_of
from prunus.engine.sequential.options import Sequential
from prunus.modifiers.base import MODIFIERS, Context
from prunus.modifiers.fields import as_in_recipes
from prunus.modifiers.nm.maskings import STE, Masking
from prunus.modifiers.nm.run import NMTrainingRun
from prunus.modifiers.nm.stages import Groups, stages
from prunus.modifiers.timing import Interval
from prunus.pruners import Magnitude


@dataclass(frozen=True)
class NMTraining:
    """Train some layers to N:M: dense weights behind masks that are chosen after each step.

    On a finished model, at once: the N of every M that are largest stay.

    >>> entry = prunus.NMTraining(pattern="2:4", layers=("0",))
    >>> prunus.Recipe.load("modifiers: [{nm_training: {layers: ['0']}}]").modifiers == (entry,)
    True
    """

    name: ClassVar[str] = "nm_training"
    one_shot: ClassVar[bool] = True

    pattern: str = "2:4"
    """N:M such as 2:4 (N kept of every M inputs; `2:4 along outputs`: of every M outputs)"""
    masking: Masking = field(default_factory=STE)
    """how pruned weights live on: `ste`, `sr_ste` or `mdgf`"""
    layers: tuple[str, ...] | None = None
    """names, globs, class names or `re:` regexes, thirds such as `attn.qkv[q]`; default: all but
    what reads the input, writes the output or routes to experts"""
    exclude: tuple[str, ...] = ()
    """what to leave out of `layers`"""
    structure: tuple[str, ...] = ()
    """patterns in turn, in equal parts of the window, the last one `pattern`; `stepwise` is 7:8,
    4:8, 2:8, 1:8 and `geometric` 8:64, 4:32, 2:16, 1:8"""
    window: Interval | None = None
    """when; dense before it, frozen after it. Default: all of training"""
    misfits: Misfits = "error"
    """of layers that the patterns do not divide: `error`, or left `dense` and named"""

    def __post_init__(self) -> None:
        as_in_recipes(self)
        check_choice("misfits", self.misfits, MISFITS)
        pattern = parse_pattern(self.pattern)
        if not isinstance(pattern, Groups):
            raise ValueError(
                f"masking '{self.masking.name}' trains N:M patterns, not '{pattern}'; write one "
                "such as pattern: '2:4'"
            )
        stages(self.structure, pattern)

    @property
    def target(self) -> Groups:
        """The pattern that is trained to."""
        pattern: Pattern = parse_pattern(self.pattern)
        assert isinstance(pattern, Groups)
        return pattern

    @property
    def final_sparsity(self) -> float | None:
        """None, because the pattern says it."""
        return None

    def plan(
        self,
        model: nn.Module,
        calibration: Calibration | None = None,
        sequential: Sequential | None = None,
    ) -> PruningPlan:
        """What to prune at once, by magnitude. Raises ValueError if it does not fit the model."""
        method = Method(Magnitude(), self.target, Uniform())
        run = first_pass_of(model, calibration, sequential)
        chosen = select(model, self.layers, self.exclude, run)
        what = method, chosen, model, calibration
        return PruningPlan(*what, sequential, on_misfit=self.misfits)

    def bind(self, context: Context) -> NMTrainingRun:
        return NMTrainingRun(self, context)


MODIFIERS.add(NMTraining.name, NMTraining)
