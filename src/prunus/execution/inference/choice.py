"""Each layer gets the form that is the fastest here, by measurement."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from prunus.execution.inference.candidates import candidates
from prunus.execution.inference.forms import Form, Spec
from prunus.execution.inference.modules import matrix_of, run
from prunus.execution.inference.stopwatch import timings, winner
from prunus.execution.inference.stored import Inexact, Stored
from prunus.execution.inference.targets import Target
from prunus.execution.inference.zeros import pattern_of

DENSE = "dense"
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class LayerExecution:
    """How one pruned layer runs, and what else it could have been."""

    name: str
    shape: tuple[int, ...]
    pattern: str
    """what its zeros look like: ``2:4``, ``4x4``, ``unstructured``"""
    sparsity: float
    rows: int
    """input rows (batch times tokens) with which it was measured"""
    form: str
    """in which it runs: ``dense``, ``csr``, ``bsr 8x8``, ``cutlass``, ..."""
    ms: Mapping[str, float] = field(default_factory=dict)
    """milliseconds of a call here, by form; empty where only ``dense`` is possible"""
    nbytes: Mapping[str, int] = field(default_factory=dict)
    """bytes of the weight, by form"""
    refused: Mapping[str, str] = field(default_factory=dict)
    """form -> why it was not measured, or not taken; ``all`` for reasons that hold for every one"""

    @property
    def measured(self) -> list[str]:
        """The forms that were timed beside ``dense``, the fastest first."""
        return sorted((name for name in self.ms if name != DENSE), key=self.ms.__getitem__)

    @property
    def why(self) -> str:
        """Why it runs dense; empty if it does not."""
        if self.form != DENSE:
            return ""
        if "all" in self.refused:
            return self.refused["all"]
        if slow := [name for name in self.measured if name not in self.refused]:
            return f"measured, and not faster by more than the noise: {', '.join(slow)}"
        grouped: dict[str, list[str]] = {}
        for name, message in self.refused.items():
            grouped.setdefault(message, []).append(name)
        return "; ".join(f"{', '.join(names)}: {message}" for message, names in grouped.items())


@dataclass(frozen=True)
class Measured:
    """What is known of layers of one shape, one sparsity and as many input rows."""

    form: str
    specs: Mapping[str, Spec]
    ms: Mapping[str, float]
    nbytes: Mapping[str, int]
    refused: Mapping[str, str]


class Chooser:
    """Chooses layer by layer; layers that are alike are measured once."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], Measured] = {}

    def choose(self, target: Target, rows: int | None) -> tuple[LayerExecution, Stored | None]:
        """The row of the layer, and its weight in the form in which it shall run, if not dense.

        ``rows`` is None if the layer is never called.
        """
        layer = target.layer
        whole = layer.matrix(layer.local)
        pattern, sparsity = pattern_of(whole), target.sparsity
        head = layer.name, layer.shape, pattern, sparsity
        reason = target.refused or ("" if rows else "the example does not reach it")
        if reason or not rows:
            return LayerExecution(*head, 0, DENSE, {}, {DENSE: whole.nbytes}, {"all": reason}), None
        matrix, bias = matrix_of(layer.module), layer.module._parameters.get("bias")
        specs, refused = candidates(matrix, rows)
        alike = matrix.shape, matrix.dtype, matrix.device, bias is None, rows
        key = *alike, pattern, round(sparsity, 2), *(spec.name for spec in specs)
        if key not in self._known:
            self._known[key] = measure(matrix, bias, rows, specs)
        known = self._known[key]
        form, refused, stored = known.form, {**refused, **known.refused}, None
        if form != DENSE:
            try:
                stored = Stored.of(matrix, known.specs[form])
            except Inexact as error:
                form, refused[form] = DENSE, str(error)
        return LayerExecution(*head, rows, form, known.ms, known.nbytes, refused), stored


def measure(matrix: Tensor, bias: Tensor | None, rows: int, specs: list[Spec]) -> Measured:
    """Time a (outputs, inputs) weight in every form, and dense, with random inputs."""
    generator = torch.Generator(matrix.device).manual_seed(0)
    x = torch.randn(
        rows, matrix.shape[1], generator=generator, dtype=matrix.dtype, device=matrix.device
    )
    calls: dict[str, Call] = {DENSE: lambda: nn.functional.linear(x, matrix, bias)}
    nbytes, refused, fit = {DENSE: matrix.nbytes}, {}, {}
    expected = calls[DENSE]()
    for spec in specs:
        try:
            stored = Stored.of(matrix, spec)
            call = _call(stored.form, x, bias)
            message = _differs(call(), expected)
        except (Inexact, RuntimeError) as error:
            # which kernels a GPU and a build of torch have, only a trial tells
            message = str(error).strip().split("\n")[0]
        if message:
            refused[spec.name] = message
            continue
        fit[spec.name], calls[spec.name], nbytes[spec.name] = spec, call, stored.nbytes
    times = timings(calls, matrix.device) if fit else {}
    ms = {name: 1e3 * timing.median for name, timing in times.items()}
    return Measured(winner(times, DENSE) if times else DENSE, fit, ms, nbytes, refused)


def _call(form: Form, x: Tensor, bias: Tensor | None) -> Call:
    return lambda: run(form, x, bias)


def _differs(got: Tensor, expected: Tensor) -> str:
    """Whether a kernel computes something else; kernels have had bugs."""
    precise = {torch.float64: 1e-9, torch.float32: 1e-3}
    tolerance = precise.get(expected.dtype, 3e-2) * float(expected.abs().max())
    worst = float((got - expected).abs().max())
    return "" if worst <= tolerance else f"it is off by {worst:.2g} in this build of torch"
