"""The statistics of a pruning step: planned to fit the memory, measured group by group."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from prunus.calibration.calibration import Calibration
from prunus.calibration.gradient_pass import measure_gradients
from prunus.calibration.input_pass import NO_INPUTS, measure_inputs
from prunus.calibration.memory_plan import Need, Rows, free_bytes, parse_bytes, plan
from prunus.core.layers import Layer
from prunus.core.ranks import Ranks, all_ranks, row_cuts
from prunus.core.sharding import any_sharded, cut_along_inputs, ranks_of
from prunus.core.wrappers import is_sharded
from prunus.solvers import selection
from prunus.stats import Statistic, all_reduce_statistics, checked_statistic

log = logging.getLogger("prunus")


def needs_of(stats: Mapping[Layer, Statistic], rows: Mapping[Layer, int]) -> list[Need]:
    """What each layer's statistic takes, if it has one; by rows where it can be split."""
    needs = []
    for layer, count in rows.items():
        stat = stats.get(layer)
        if stat is None:
            needs.append(Need(layer, max(1, count), 0))
        elif stat.by_rows:
            needs.append(Need(layer, count, stat.with_rows(1).nbytes))
        else:
            needs.append(Need(layer, max(1, count), 0, stat.nbytes))
    return needs


def budget_of(calibration: Calibration | None, layers: Sequence[Layer], device: str | None) -> int:
    """Bytes for statistics: what the calibration says, or four fifths of what is free."""
    if calibration is not None and calibration.memory is not None:
        return parse_bytes(calibration.memory)
    place = layers[0].local.device if device is None else torch.device(device)
    free = free_bytes(place)
    return 1 << 62 if free is None else free * 4 // 5


@dataclass
class Measurements:
    """The statistics of some layers, a group of rows at a time where memory asks for it.

    ``shares`` are the rows of each layer that this rank works on: all that it has, or under
    data-parallel training its part of the rows, which are then the same on no two ranks.
    ``groups`` cut the shares further; the statistics of one group are held at a time.
    """

    model: nn.Module
    calibration: Calibration | None
    statistic: Callable[[Layer], Statistic | None]
    stats: Mapping[Layer, Statistic]
    """of all the rows of each layer, empty: what will be measured"""
    shares: list[Rows]
    groups: list[list[Rows]]
    everyone: Ranks
    """the ranks among which shares are dealt out; a single one where all have all rows"""
    begin: int = 0
    """calibration batches that were used up before"""
    used: int = 0
    """calibration batches that one measurement took"""
    held: tuple[int, dict[Rows, Statistic]] | None = field(default=None, repr=False)
    unreached: dict[Layer, str] = field(default_factory=dict, repr=False)
    """layers about which the data told nothing, on any rank, and a clause to put before their
    names; known of the groups that have been measured"""

    def bytes_of(self, group: Sequence[Rows]) -> int:
        """What the statistics of some rows take."""
        return sum(self._empty(rows).nbytes for rows in group if rows.layer in self.stats)

    @property
    def nbytes(self) -> int:
        """What is held at a time, at most."""
        return max(self.bytes_of(group) for group in self.groups)

    def fill(self, stats: dict[Rows, Statistic], unreached: Mapping[Layer, str]) -> None:
        """Statistics that somebody else has measured, in place of the only group's."""
        assert len(self.groups) == 1
        self.held, self.unreached = (0, stats), dict(unreached)

    def __getitem__(self, i: int) -> dict[Rows, Statistic]:
        """The statistics of the i-th group, measured unless they were the last ones asked for."""
        if self.held is None or self.held[0] != i:
            self.held = None  # frees the memory first
            self.held = (i, self._measure(self.groups[i]))
        return self.held[1]

    def gathered(self, rows: Rows, part: Tensor) -> Tensor:
        """All rows of a layer, of which each rank has its share."""
        whole = part.new_zeros(rows.layer.matrix_shape(tuple(rows.layer.local.shape)))
        whole[rows.begin : rows.end] = part
        if part.dtype == torch.bool:
            return self.everyone.all_reduce(whole.view(torch.uint8)).bool()
        return self.everyone.all_reduce(whole)

    def _measure(self, group: Sequence[Rows]) -> dict[Rows, Statistic]:
        stats = {rows: self._empty(rows) for rows in group if rows.layer in self.stats}
        if not stats:
            return {}
        assert self.calibration is not None
        gradients = {rows: stat for rows, stat in stats.items() if stat.reads == "gradients"}
        inputs = {rows.layer: stat for rows, stat in stats.items() if stat.reads == "inputs"}
        with all_ranks().raise_on_all_ranks():
            if gradients:
                self.used, silent = self._gradients(gradients)
                self.unreached |= silent
            if inputs:
                shared, missed = measure_inputs(self.model, inputs, self.calibration)
                self.unreached |= {x: NO_INPUTS for x in inputs if x in missed}
                stats = {rows: shared.get(rows.layer, stat) for rows, stat in stats.items()}
        all_reduce_statistics(stat for stat in stats.values() if not stat.by_rows)
        _check_finite({rows.layer: stat for rows, stat in stats.items() if stat.reads == "inputs"})
        _tell_shortage({x: stat for x, stat in stats.items() if x.layer not in self.unreached})
        return stats

    def _empty(self, rows: Rows) -> Statistic:
        stat = self.statistic(rows.layer)
        assert stat is not None
        if stat.by_rows:
            return stat.with_rows(len(rows))
        return stat

    def _gradients(self, stats: Mapping[Rows, Statistic]) -> tuple[int, dict[Layer, str]]:
        title = "gradients"
        if len(self.groups) > 1:
            number = next(i for i, group in enumerate(self.groups) if set(stats) <= set(group))
            title = f"gradients, part {number + 1} of {len(self.groups)}"
        assert self.calibration is not None
        return measure_gradients(
            self.model, stats, self.calibration, self.begin, self.everyone, title
        )


def measurements(
    statistic: Callable[[Layer], Statistic | None],
    layers: Sequence[Layer],
    model: nn.Module,
    calibration: Calibration | None,
    unit: int = 1,
    begin: int = 0,
) -> Measurements:
    """The plan of what to measure; nothing is measured yet.

    ``unit`` rows of a layer stay on one rank. Raises ValueError if the statistics of a single row
    do not fit the memory.
    """
    needed = {layer: statistic(layer) for layer in layers}
    stats = {layer: checked_statistic(stat) for layer, stat in needed.items() if stat is not None}
    shared_out = any(stat.by_rows for stat in stats.values()) and not any_sharded(layers)
    everyone = all_ranks() if shared_out else Ranks()
    local_shares, most = {}, {}
    for layer in layers:
        rows = layer.matrix_shape(tuple(layer.local.shape))[0]
        cuts = row_cuts(rows, everyone.world_size, unit)
        local_shares[layer] = Rows(layer, *cuts[everyone.rank])
        most[layer] = max(end - start for start, end in cuts)
        if any_sharded(layers):  # the first rank has the most
            most[layer] = -(-layer.matrix_shape()[0] // ranks_of(layer.weight).world_size)
    shares = list(local_shares.values())
    if not stats:
        return Measurements(model, calibration, statistic, stats, shares, [shares], everyone, begin)
    device = next((stat.device for stat in stats.values() if stat.device), None)
    budget = budget_of(calibration, layers, device)
    if all_ranks().group is not None:  # every rank must make the same passes
        budgets = torch.zeros(all_ranks().world_size, dtype=torch.int64)
        budgets[all_ranks().rank] = budget
        budget = int(all_ranks().all_reduce(budgets).min())
    groups = [
        [_within(rows, local_shares[rows.layer]) for rows in group]
        for group in plan(needs_of(stats, most), budget)
    ]
    return Measurements(model, calibration, statistic, stats, shares, groups, everyone, begin)


def _within(piece: Rows, share: Rows) -> Rows:
    """The piece, counted from the start of a share, as rows of the layer."""
    begin = min(share.begin + piece.begin, share.end)
    return Rows(piece.layer, begin, min(share.begin + piece.end, share.end))


def _tell_shortage(stats: Mapping[Rows, Statistic]) -> None:
    """One warning, if layers have seen less than what is solved from them has unknowns."""
    short = {rows.layer.name: text for rows, stat in stats.items() if (text := stat.shortage())}
    if short:
        name, text = next(iter(short.items()))
        log.warning(
            "too little calibration data for %d of %d layers, such as %s: %s. The result fits the "
            "calibration data, not new data, and may be worse than that of magnitude; give at "
            "least as many (of gradients: or a smaller block_size)",
            len(short), len(stats), name, text,
        )  # fmt: skip


def _check_finite(stats: Mapping[Layer, Statistic]) -> None:
    """Raises ValueError, on every rank, if sums over all ranks' inputs are no numbers."""
    for layer, stat in stats.items():
        if any(selection.count_non_finite(t) for t in stat.tensors()):
            raise ValueError(
                f"{layer.parameter_name} has NaN or infinite inputs on the calibration data, or "
                "too large to be squared; nothing was pruned"
            )


def check_measurable(
    stats: Mapping[Layer, Statistic], name: str, calibration: Calibration | None
) -> None:
    """Raises ValueError if there is no data to measure on, or a layer cannot be measured."""
    if stats and calibration is None:
        raise ValueError(
            f"{name} learns from data; pass calibration=prunus.Calibration(batches, loss_fn)"
        )
    if cut := [layer.name for layer in stats if cut_along_inputs(layer)]:
        raise ValueError(
            f"{', '.join(cut[:3])}: sharded along the inputs, which {name} "
            "measures; exclude them, or use a pruner that needs no data"
        )
    for layer, stat in stats.items():
        sampling = stat.sampling
        if is_sharded(layer.weight) and sampling and sampling.samples == "example":
            raise ValueError(
                f"{layer.name} is sharded by FSDP2, which hands out gradients of whole batches "
                "only; use samples='micro_batch'"
            )
