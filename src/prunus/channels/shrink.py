"""Channels, heads and key/value heads out of a live model, in one call."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from prunus.allocators import Allocator
from prunus.calibration.batch_norm import recalibrate
from prunus.calibration.calibration import Calibration
from prunus.channels.allocate import Choice, Cost, allocate
from prunus.channels.checking import check_same
from prunus.channels.compensate import Compensation, Update
from prunus.channels.configs import follow_config
from prunus.channels.criteria import CRITERIA, Criterion, Evidence
from prunus.channels.groups import Channels, Group, channels
from prunus.channels.latency import latency
from prunus.channels.refusals import check_shrinkable
from prunus.channels.result import Row, Shrunk, Size, stored_bytes
from prunus.channels.selecting import chosen_groups
from prunus.channels.shapes import remember
from prunus.channels.surgery import Change, cut, gone_mask, kept_positions
from prunus.channels.verify import masked, outputs, probes
from prunus.channels.zeros import zero_units

log = logging.getLogger("prunus")
TARGETS = ("params", "macs", "latency")


def shrink(
    model: nn.Module,
    example_inputs: Any,
    criterion: str | Criterion | None = "magnitude",
    target: Mapping[str, float] | None = None,
    allocator: str | Allocator | Mapping[str, float] = "uniform",
    round_to: int = 1,
    layers: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    calibration: Calibration | None = None,
    compensate: bool | Update = False,
    uniform: bool = False,
    verify: bool = True,
    width: bool = False,
    measure: bool = True,
) -> Shrunk:
    """Remove units from `model` in place, and say what that brought.

    ``target`` is what remains, ``{"macs": 0.5}``, ``{"params": ...}`` or ``{"latency": ...}``: a
    fraction, or an absolute number above one (multiply-accumulates of one pass on the example
    inputs, parameters, milliseconds). Without a target the allocator must be a table, group ->
    share of its units that goes. With ``criterion=None`` what is zero already is removed, and
    nothing else. ``round_to`` is what widths become a multiple of. ``layers`` and ``exclude`` are
    names, globs or ``re:`` of the modules that write the channels. ``width`` also offers the
    channels that norms run over: the width of a transformer. ``compensate`` refits the readers of
    what went (True, or ``"bias"`` alone) on the calibration data, on which BatchNorm is estimated
    anew. ``uniform`` keeps one size for all blocks of a kind, so that a config can say it.

    Raises ValueError where the model, a name or the target cannot be served, and where the smaller
    model does not compute what the model with masked units does; the model is then as it was.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> inputs = torch.zeros(1, 4)
    >>> result = prunus.shrink(net, inputs, target={"params": 0.5}, measure=False)
    >>> net[0].out_features, result.after.params
    (3, 23)
    """
    check_shrinkable(model)
    found = channels(model, example_inputs)
    before = _size(model, found, None, example_inputs, measure)
    judge = CRITERIA[criterion]() if isinstance(criterion, str) else criterion
    evidence = Evidence(model, found, calibration)
    if judge is None:
        gone = zero_units(model, found)
    else:
        groups = chosen_groups(found, layers, exclude, width)
        scores = _scores(judge, groups, evidence, allocator)
        choice = Choice([g for g in groups if g.name in scores], scores, round_to, uniform)
        gone = _allocated(choice, allocator, target, found, model, example_inputs)
    update = _update(compensate, judge, calibration)
    change = Change()
    try:
        remarks = _remove(model, found, gone, change, example_inputs, verify, update, evidence)
    except BaseException:
        change.undo()
        raise
    mask = gone_mask(found, gone)
    after = _size(model, found, mask, example_inputs, measure)
    result = Shrunk(
        _rows(found, gone),
        before,
        after,
        gone,
        kept_positions(found, mask),
        change.attributes_by_module(model),
        remarks,
    )
    remember(model, result)
    return result


def _scores(
    judge: Criterion,
    groups: Sequence[Group],
    evidence: Evidence,
    allocator: str | Allocator | Mapping[str, float],
) -> dict[str, Tensor]:
    scores = judge.score(groups, evidence)
    if not judge.comparable:
        # ranked together, each group counts relative to its mean
        scores = {name: s / s.mean().clamp_min(1e-30) for name, s in scores.items()}
    if not scores:
        raise ValueError(f"criterion {judge.name!r} can judge none of the groups; use 'magnitude'")
    return scores


def _update(
    compensate: bool | Update, judge: Criterion | None, calibration: Calibration | None
) -> Update:
    """What the readers get; a criterion with an update of its own brings it along."""
    update: Update = "weights" if compensate is True else compensate or "none"
    if update not in ("none", "bias", "weights"):
        raise ValueError(f"compensate={compensate!r}; use True, False, 'bias' or 'weights'")
    if update == "none" and judge is not None:
        update = judge.update  # type: ignore[assignment]
    if update != "none" and calibration is None:
        raise ValueError("compensate needs data: pass calibration=prunus.Calibration(batches)")
    return update


def _allocated(
    choice: Choice,
    allocator: str | Allocator | Mapping[str, float],
    target: Mapping[str, float] | None,
    found: Channels,
    model: nn.Module,
    example_inputs: Any,
) -> dict[str, list[int]]:
    if target is None:
        if isinstance(allocator, str):
            raise ValueError("target: say what is to remain, such as target={'macs': 0.5}")
        return allocate(choice, allocator, None, 0.0)
    kind, limit = _parsed(target)
    cost = _cost(kind, found, model, example_inputs)
    if limit <= 1:
        limit *= cost({})
    return allocate(choice, allocator, cost, limit)


def _parsed(target: Mapping[str, float]) -> tuple[str, float]:
    if len(target) != 1 or next(iter(target)) not in TARGETS:
        raise ValueError(
            f"target={dict(target)!r}; use one of {', '.join(TARGETS)}: {{'macs': 0.5}}"
        )
    kind, limit = next(iter(target.items()))
    if not limit > 0:
        raise ValueError(f"target {kind}={limit}; use a fraction up to 1, or a number above it")
    return kind, float(limit)


def _cost(kind: str, found: Channels, model: nn.Module, example_inputs: Any) -> Cost:
    if kind != "latency":
        return lambda gone: float(found.costs.total(kind, gone_mask(found, gone)))

    def measured(gone: Mapping[str, Sequence[int]]) -> float:
        change = Change()
        try:
            cut(model, found, gone_mask(found, gone), change)
            return latency(model, example_inputs)
        finally:
            change.undo()

    return measured


def _remove(
    model: nn.Module,
    found: Channels,
    gone: Mapping[str, Sequence[int]],
    change: Change,
    example_inputs: Any,
    verify: bool,
    update: Update,
    evidence: Evidence,
) -> list[str]:
    """Cut, compare, compensate. Returns remarks for the result."""
    mask = gone_mask(found, gone)
    remarks = []
    inputs = probes(example_inputs)
    expected = []
    if verify:
        with masked(model, found, mask):
            expected = outputs(model, inputs)
    compensation = None
    if update != "none" and gone:
        data = evidence.data("compensate")
        compensation = Compensation(model, found, mask, update, data, evidence.moments)
    cut(model, found, mask, change)
    remarks += follow_config(model, found, mask, change)
    if verify:
        check_same(model, expected, inputs, found, gone)
    if compensation is not None:
        compensation.apply(change)
        if compensation.unbiased:
            remarks.append(f"{len(compensation.unbiased)} readers have no bias to correct")
    if evidence.calibration is not None:
        _renormalize(model, evidence.calibration, change)
    return remarks


def _renormalize(model: nn.Module, calibration: Calibration, change: Change) -> None:
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if norms:
        for norm in norms:
            for buffer in norm.buffers():
                change.data(buffer, buffer.data.clone())
        recalibrate(model, calibration)


def _size(
    model: nn.Module, found: Channels, gone: Tensor | None, example_inputs: Any, measure: bool
) -> Size:
    params = sum(p.numel() for p in model.parameters())
    macs = found.costs.total("macs", gone)
    milliseconds = latency(model, example_inputs) if measure else None
    return Size(params, macs, stored_bytes(model), milliseconds)


def _rows(found: Channels, gone: Mapping[str, Sequence[int]]) -> list[Row]:
    return [
        Row(g.name, g.kind, g.size, g.size - len(gone.get(g.name, ())), g.exact)
        for g in found.groups
        if g.name in gone
    ]
