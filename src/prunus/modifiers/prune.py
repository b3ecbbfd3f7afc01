"""The recipe entry ``prune``: remove weights, by which method, how many, where and when."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from prunus.allocators import ALLOCATORS, Allocator, Table
from prunus.calibration.calibration import Calibration
from prunus.core.names import check_choice
from prunus.core.patterns import Pattern, parse_pattern
from prunus.core.selection import select
from prunus.engine.fitting import MISFITS, Misfits
from prunus.engine.method import UNREACHED, Method, Unreached
from prunus.engine.permute.step import Permute
from prunus.engine.plan import PruningPlan, first_pass_of
from prunus.engine.sequential.options import Sequential
from prunus.modifiers.base import MODIFIERS, Context
from prunus.modifiers.fields import as_in_recipes
from prunus.modifiers.nm.modifier import NMTraining
from prunus.modifiers.pruning_run import PruningRun
from prunus.modifiers.schedules import Schedule
from prunus.modifiers.timing import Window
from prunus.pruners import Magnitude, Pruner, supports


class _TakesMasking(type):
    """``masking`` and ``structure`` of version 0.1, which are settings of `NMTraining` now."""

    def __call__(cls, *args: Any, masking: Any = None, structure: Any = (), **kwargs: Any) -> Any:
        if masking is None and not structure:
            return super().__call__(*args, **kwargs)
        if cls is not PruningModifier:
            raise ValueError(f"{cls.__name__} masks hard; N:M training is NMTraining")
        warnings.warn("masking belongs to prunus.NMTraining now", FutureWarning, stacklevel=2)
        return NMTraining(**{**kwargs, "masking": masking, "structure": structure})


@dataclass(frozen=True)
class PruningModifier(metaclass=_TakesMasking):
    """Prune some layers over a window of training, or at once on a finished model.

    >>> modifier = prunus.PruningModifier(prunus.Wanda(), pattern="2:4", layers=("0",))
    >>> text = "modifiers: [{prune: {pruner: wanda, pattern: '2:4', layers: ['0']}}]"
    >>> prunus.Recipe.load(text).modifiers == (modifier,)
    True
    """

    name: ClassVar[str] = "prune"
    one_shot: ClassVar[bool] = True

    pruner: Pruner = field(default_factory=Magnitude)
    """the method: a name, or a mapping of its name and hyperparameters"""
    sparsity: float | Schedule | None = None
    """share of weights removed: a number or a schedule; N:M patterns and tables bring their own"""
    layers: tuple[str, ...] | None = None
    """names, globs, class names or `re:` regexes, thirds such as `attn.qkv[q]`; default: all but
    what reads the input, writes the output or routes to experts"""
    exclude: tuple[str, ...] = ()
    """what to leave out of `layers`"""
    pattern: str = "unstructured"
    """unstructured, row, N:M such as 2:4 (N kept of every M inputs; `2:4 along outputs`: of every M
    outputs), or block such as 4x1"""
    allocator: Allocator | None = None
    """how the layers share the sparsity; default: the pruner's own"""
    window: Window | None = None
    """when; default: at once, or over all of training for a schedule"""
    sequential: bool | str = False
    """prune block by block, each on the outputs of the pruned ones before: the name of the list of
    blocks, as `model.layers`, or true to walk all lists"""
    permute: Permute | None = None
    """for N:M: regroup input channels first, so that less is lost; once on a finished model"""
    misfits: Misfits = "error"
    """of layers that the pattern does not divide, or whose inputs cannot be measured: `error`, or
    left `dense` and named in the result"""
    unreached: Unreached = "error"
    """of layers about which the calibration data tells nothing (no token came to them, no loss
    depends on them): `error`, pruned by `magnitude`, or left `dense`; named in the result"""

    def __post_init__(self) -> None:
        as_in_recipes(self, Window)
        if not isinstance(self.pruner, Pruner) or isinstance(self.pruner, type):
            raise ValueError(
                f"pruner={self.pruner!r} is no pruner; give one, as prunus.Magnitude()"
            )
        check_choice("misfits", self.misfits, MISFITS)
        check_choice("unreached", self.unreached, UNREACHED)
        pattern = parse_pattern(self.pattern)
        supports(self.pruner, pattern)
        if self.at_once and self.window and (self.window.to or self.window.every):
            raise ValueError(
                "a constant sparsity is pruned at once, when the window begins; drop the window's "
                "'to' and 'every', or give a schedule such as sparsity: {from: 0.3, to: 0.75}"
            )
        for value in self.schedule.extremes if self.schedule else ():
            if not 0 <= value <= 1:
                raise ValueError(f"sparsity {value} is not between 0 and 1")
        if self.schedule and self.schedule.final < max(self.schedule.extremes):
            raise ValueError(
                f"sparsity falls to {self.schedule.final:g}, but pruned weights do not come back"
            )
        if pattern.fixed is not None:
            self._check_fixed(pattern.fixed)
        elif self.sparsity is None and not isinstance(self.allocator, Table):
            raise ValueError("no sparsity was given; give one, such as sparsity: 0.75")

    def _check_fixed(self, fixed: float) -> None:
        if self.allocator is not None:
            raise ValueError(
                f"pattern '{self.pattern}' fixes every layer's share; drop 'allocator'"
            )
        if self.schedule and any(abs(v - fixed) > 1e-9 for v in self.schedule.extremes):
            raise ValueError(
                f"pattern '{self.pattern}' has sparsity {fixed:g}; drop 'sparsity', or write that"
            )

    @property
    def schedule(self) -> Schedule | None:
        if self.sparsity is None or isinstance(self.sparsity, Schedule):
            return self.sparsity
        return Schedule(to=self.sparsity)

    @property
    def at_once(self) -> bool:
        """Whether there is a single pruning step."""
        return self.schedule is None or self.schedule.kind == "constant"

    @property
    def final_sparsity(self) -> float | None:
        """Sparsity in the end; None where a pattern or a table says it."""
        return None if self.schedule is None else self.schedule.final

    @property
    def method(self) -> Method:
        pattern: Pattern = parse_pattern(self.pattern)
        allocator = self.allocator or ALLOCATORS[self.pruner.allocator]()
        return Method(self.pruner, pattern, allocator, unreached=self.unreached)

    def plan(
        self,
        model: nn.Module,
        calibration: Calibration | None = None,
        sequential: Sequential | None = None,
    ) -> PruningPlan:
        """What to prune and how; ``sequential`` stands in for the modifier's own.

        Raises ValueError if it does not fit the model.
        """
        walk = sequential or Sequential.of(self.sequential)
        chosen = select(model, self.layers, self.exclude, first_pass_of(model, calibration, walk))
        what = self.method, chosen, model, calibration
        return PruningPlan(*what, walk, self.permute, self.misfits)

    def bind(self, context: Context) -> PruningRun:
        return PruningRun(self, context)


MODIFIERS.add(PruningModifier.name, PruningModifier)
