"""`sweep`: one set of statistics, many sparsities; several methods, patterns and seeds in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunus.allocators import ALLOCATORS, Table
from prunus.api.arguments import (
    AllocatorLike,
    as_allocator,
    as_names,
    as_pruner,
    check_same_on_all_ranks,
    norms_data,
)
from prunus.api.sweep_result import Evaluate, SweepResult, SweepRow, labels_of
from prunus.calibration.batch_norm import put_back
from prunus.calibration.batch_norm import recalibrate as estimate_norms
from prunus.calibration.calibration import Calibration, as_calibration, first_pass
from prunus.core.layers import Layer
from prunus.core.names import check_choice
from prunus.core.numbers import is_finite
from prunus.core.patterns import parse_pattern
from prunus.core.progress import track
from prunus.core.selection import Selection, select
from prunus.core.wrappers import reshard
from prunus.engine.fitting import MISFITS, Misfits, fitting_layers, without_depthwise
from prunus.engine.method import UNREACHED, LayerUpdate, Method, Unreached, unreached_messages
from prunus.engine.step import check_reachable, prepare_sweep
from prunus.modifiers.events import pruning_event
from prunus.pruners import Pruner
from prunus.recipe.build import dump
from prunus.report.records import Recorder, number, start_event

PrunerLike = str | Pruner


def sweep(
    model: nn.Module | Callable[[int], nn.Module],
    pruner: PrunerLike | Sequence[PrunerLike] | Mapping[str, PrunerLike],
    sparsities: Iterable[float],
    evaluate: Evaluate,
    *,
    pattern: str | Sequence[str] = "unstructured",
    layers: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str = (),
    allocator: AllocatorLike = None,
    calibration: Calibration | None = None,
    recalibrate: bool | Calibration = False,
    seeds: Sequence[int] | None = None,
    misfits: Misfits = "error",
    unreached: Unreached = "error",
) -> SweepResult:
    """Prune to each sparsity, call ``evaluate(model)``, and put the weights back bit for bit.

    Statistics and scores are computed once and serve all sparsities; one copy of the pruned weights
    is kept meanwhile. ``evaluate`` returns a number, or a mapping of names to numbers. The other
    arguments are those of `prune`.

    Several pruners (a list, or a mapping of labels to pruners), patterns and seeds are gone through
    in turn, into one table and one picture; a pattern such as 2:4 among them is one point, at the
    sparsity that it has. For each of ``seeds`` random numbers begin anew before statistics are
    measured; ``model`` may then be a function of the seed that returns the model, to compare models
    trained from several.

    Raises ValueError if anything does not fit; the model is then untouched.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> before = model[0].weight.clone()
    >>> prunus.sweep(model, "magnitude", [0.5, 0.75], lambda m: prunus.sparsity(m)["0"]).values
    {0.5: {'value': 0.5}, 0.75: {'value': 0.75}}
    >>> torch.equal(model[0].weight, before)
    True
    >>> result = prunus.sweep(model, ["magnitude", "ri"], [0.5], lambda m: 1.0, seeds=[0, 1])
    >>> list(result.curves), len(result.rows)
    (['magnitude', 'ri'], 4)
    """
    chosen = None if layers is None else as_names(layers), as_names(exclude)
    calibration = as_calibration(calibration)
    norms = norms_data(recalibrate, calibration)
    check_choice("misfits", misfits, MISFITS)
    check_choice("unreached", unreached, UNREACHED)
    methods = _methods(pruner, pattern, sparsities, allocator, unreached)
    _check_ranks(methods, chosen, seeds, calibration)
    result = SweepResult({}, recorder=Recorder())
    for seed in _listed(seeds):
        network = model if isinstance(model, nn.Module) else _made(model, seed)
        selection = select(network, *chosen, first_pass(network, calibration))
        if not result.recorder.events:
            result.recorder(start_event(network, 0, left_dense=selection.spared))
        fitted = [each.fit(selection, misfits, result) for each in methods]
        for each, matrices in zip(methods, fitted, strict=True):
            with _seeded(seed):
                prune_to = prepare_sweep(each.method, matrices, network, calibration)
                trials = each.trials(network, matrices, prune_to, evaluate, norms, result)
                for row, event in trials:
                    result.rows.append(row._replace(seed=seed))
                    result.recorder(event if seed is None else {**event, "seed": seed})
    return result.summed_up()


@dataclass(frozen=True)
class _Swept:
    """One method, and the sparsities that it is tried at."""

    label: str
    method: Method
    sparsities: tuple[float, ...]

    def fit(self, selection: Selection, misfits: Misfits, result: SweepResult) -> list[Layer]:
        chosen = without_depthwise(self.method, selection).layers
        fitted, unfit = fitting_layers(self.method, chosen, misfits)
        result.misfits |= unfit
        if isinstance(self.method.allocator, Table):
            self.method.allocator.check([layer.name for layer in fitted], unfit)
        if self.method.pattern.fixed is None:
            check_reachable(fitted, self.method.pattern, min(self.sparsities))
        return fitted

    def trials(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        prune_to: Callable[[float], list[LayerUpdate]],
        evaluate: Evaluate,
        norms: Calibration | None,
        result: SweepResult,
    ) -> Iterator[tuple[SweepRow, dict[str, Any]]]:
        """Each sparsity, evaluated, and its event; the model is as it was when it is over."""
        saved = [(layer.local, layer.local.clone()) for layer in layers]
        pattern = str(self.method.pattern)
        try:
            for sparsity in track(self.sparsities, f"sweep, {self.label}"):
                rows = [change.row for change in prune_to(sparsity)]
                with put_back(model, always=True):
                    if norms is not None:
                        estimate_norms(model, norms)
                    metrics = _metrics(evaluate(model))
                _restore(model, saved)
                result.unreached = unreached_messages(rows) or result.unreached
                event = pruning_event(self.label, pattern, rows, 0, sparsity, result.misfits)
                row = SweepRow(self.label, pattern, None, sparsity, metrics)
                yield row, {**event, "event": "sweep", "values": metrics}
        finally:
            _restore(model, saved)


def _methods(
    pruner: Any,
    pattern: str | Sequence[str],
    sparsities: Iterable[float],
    allocator: AllocatorLike,
    unreached: Unreached,
) -> list[_Swept]:
    """What is to be tried, checked as far as that goes without a model."""
    shares = tuple(float(sparsity) for sparsity in sparsities)
    if not shares:
        raise ValueError("no sparsities were given; give at least one, such as [0.5, 0.75]")
    if bad := [s for s in shares if not (is_finite(s) and 0 <= s <= 1)]:
        raise ValueError(f"sparsity {bad[0]:g} is not between 0 and 1")
    if isinstance(pattern, str) and parse_pattern(pattern).fixed is not None:
        raise ValueError(f"pattern '{pattern}' has one sparsity only; use prune instead of sweep")
    patterns = [parse_pattern(x) for x in ([pattern] if isinstance(pattern, str) else pattern)]
    if not patterns:
        raise ValueError("no patterns were given; give at least one, such as ['unstructured']")
    several = isinstance(pruner, Mapping | Sequence) and not isinstance(pruner, str)
    found = []
    for label, each in labels_of(pruner if several else [pruner], as_pruner).items():
        spread = as_allocator(allocator) or ALLOCATORS[each.allocator]()
        for form in patterns:
            at = shares if form.fixed is None else (form.fixed,)
            found.append(_Swept(label, Method(each, form, spread, unreached=unreached), at))
    if not found:
        raise ValueError("no pruners were given; give at least one, such as ['magnitude']")
    return found


def _listed(seeds: Sequence[int] | None) -> Sequence[int | None]:
    if seeds is not None and not list(seeds):
        raise ValueError("seeds is empty; give at least one, such as [0, 1, 2], or none at all")
    return (None,) if seeds is None else list(seeds)


def _made(model: Callable[[int], nn.Module], seed: int | None) -> nn.Module:
    if seed is None or not callable(model):
        raise ValueError("model is no torch.nn.Module; a function of a seed goes with seeds=[0, 1]")
    made = model(seed)
    if not isinstance(made, nn.Module):
        kind = type(made).__name__
        raise ValueError(f"model({seed}) returned {kind}, not a torch.nn.Module")
    return made


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Random numbers that begin with the seed, and go on afterwards as if nothing had been."""
    if seed is None:
        yield
        return
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def _check_ranks(
    methods: Sequence[_Swept], chosen: Any, seeds: Sequence[int] | None, data: Calibration | None
) -> None:
    """Raises ValueError, on all ranks, where these were asked for different things."""
    told = []
    for each in methods:
        pruner, allocator = dump(each.method.pruner), dump(each.method.allocator)
        told.append(f"{pruner}, {each.method.pattern}, {allocator}, {each.sparsities}")
    check_same_on_all_ranks(data, methods="\n".join(told), layers=chosen, seeds=seeds)


def _metrics(value: Any) -> dict[str, float]:
    metrics = value if isinstance(value, Mapping) else {"value": value}
    return {str(name): number(metric) for name, metric in metrics.items()}


@torch.no_grad()
def _restore(model: nn.Module, saved: Sequence[tuple[Tensor, Tensor]]) -> None:
    reshard(model)
    for weight, old in saved:
        weight.copy_(old)
