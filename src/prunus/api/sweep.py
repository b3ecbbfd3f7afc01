"""`sweep`: one set of statistics, many sparsities."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunus.allocators import ALLOCATORS, Table
from prunus.api.arguments import AllocatorLike, as_allocator, as_names, as_pruner, norms_data
from prunus.api.results import Evaluate, SweepResult
from prunus.calibration.batch_norm import put_back
from prunus.calibration.batch_norm import recalibrate as estimate_norms
from prunus.calibration.calibration import Calibration, as_calibration
from prunus.core.layers import reshard
from prunus.core.names import check_choice
from prunus.core.patterns import parse_pattern
from prunus.core.progress import track
from prunus.core.selection import select
from prunus.engine.fitting import MISFITS, Misfits, fitting_layers
from prunus.engine.method import UNREACHED, Method, Unreached, unreached_messages
from prunus.engine.step import check_reachable, prepare_sweep
from prunus.modifiers.events import pruning_event
from prunus.pruners import Pruner
from prunus.report.records import Recorder, number, start_event


def sweep(
    model: nn.Module,
    pruner: str | Pruner,
    sparsities: Iterable[float],
    evaluate: Evaluate,
    *,
    pattern: str = "unstructured",
    layers: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str = (),
    allocator: AllocatorLike = None,
    calibration: Calibration | None = None,
    recalibrate: bool | Calibration = False,
    misfits: Misfits = "error",
    unreached: Unreached = "error",
) -> SweepResult:
    """Prune to each sparsity, call ``evaluate(model)``, and put the weights back bit for bit.

    Statistics and scores are computed once and serve all sparsities; one copy of the pruned weights
    is kept meanwhile. ``evaluate`` returns a number, or a mapping of names to numbers. The other
    arguments are those of `prune`.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> before = model[0].weight.clone()
    >>> prunus.sweep(model, "magnitude", [0.5, 0.75], lambda m: prunus.sparsity(m)["0"]).values
    {0.5: {'value': 0.5}, 0.75: {'value': 0.75}}
    >>> torch.equal(model[0].weight, before)
    True
    """
    sparsities = [float(sparsity) for sparsity in sparsities]
    if not sparsities:
        raise ValueError("no sparsities were given; give at least one, such as [0.5, 0.75]")
    calibration = as_calibration(calibration)
    method = Method(
        as_pruner(pruner),
        parse_pattern(pattern),
        as_allocator(allocator) or ALLOCATORS[as_pruner(pruner).allocator](),
        unreached=unreached,
    )
    check_choice("misfits", misfits, MISFITS)
    check_choice("unreached", unreached, UNREACHED)
    if bad := [s for s in sparsities if not 0 <= s <= 1]:
        raise ValueError(f"sparsity {bad[0]:g} is not between 0 and 1")
    if method.pattern.fixed is not None:
        raise ValueError(f"pattern '{pattern}' has one sparsity only; use prune instead of sweep")
    chosen = select(model, None if layers is None else as_names(layers), as_names(exclude))
    fitted, unfit = fitting_layers(method, chosen.layers, misfits)
    if isinstance(method.allocator, Table):
        method.allocator.check([layer.name for layer in fitted], unfit)
    check_reachable(fitted, method.pattern, min(sparsities))
    prune_to = prepare_sweep(method, fitted, model, calibration)
    norms = norms_data(recalibrate, calibration)
    saved = [(layer.local, layer.local.clone()) for layer in fitted]
    recorder, values = Recorder(), {}
    recorder(start_event(model, 0))
    try:
        for sparsity in track(sparsities, "sweep"):
            changes = prune_to(sparsity)
            rows = [change.row for change in changes]
            del changes
            with put_back(model, always=True):
                if norms is not None:
                    estimate_norms(model, norms)
                metrics = _metrics(evaluate(model))
            values[sparsity] = metrics
            event = pruning_event(method.pruner.name, pattern, rows, 0, sparsity, unfit)
            recorder({**event, "event": "sweep", "values": metrics})
            _restore(model, saved)
    finally:
        _restore(model, saved)
    return SweepResult(values, recorder, unfit, unreached_messages(rows))


def _metrics(value: Any) -> dict[str, float]:
    metrics = value if isinstance(value, Mapping) else {"value": value}
    return {str(name): number(metric) for name, metric in metrics.items()}


@torch.no_grad()
def _restore(model: nn.Module, saved: Sequence[tuple[Tensor, Tensor]]) -> None:
    reshard(model)
    for weight, old in saved:
        weight.copy_(old)
