"""One pass over calibration data that fills statistics with gradients, on one rank or several."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from prunus.calibration.calibration import Calibration, undisturbed
from prunus.calibration.example_gradients import (
    ExampleGradients,
    Grads,
    gradients_on,
    micro_batch_gradients,
)
from prunus.calibration.gradient_checks import (
    ABSENT,
    BAD,
    GOOD,
    NONE,
    ZERO,
    GradientChecks,
    counted_inputs,
)
from prunus.calibration.memory_plan import Rows
from prunus.core.layers import Layer
from prunus.core.progress import track
from prunus.core.ranks import Ranks, all_ranks, lockstep, no_error_sync
from prunus.core.sharding import any_sharded
from prunus.stats import Sampling, Statistic, take_in

log = logging.getLogger("prunus")
AT_ONCE = 16  # examples whose gradients are formed together


class Packet(NamedTuple):
    """Some samples of the gradients of all layers, from one calibration batch."""

    grads: Grads
    batch: int
    used: int
    """batches read so far"""


def _packets(
    model: nn.Module,
    layers: Sequence[Layer],
    calibration: Calibration,
    sampling: Sampling,
    begin: int,
    quota: int,
    at_once: int,
) -> Iterator[Packet]:
    batches = calibration.stretch(begin) if quota else iter(())
    if any_sharded(layers):  # a forward pass gathers weights from all ranks
        batches = lockstep(batches, all_ranks(), all_needed=True)
    examples = ExampleGradients(model, layers, calibration, at_once)
    taken = 0
    for used, (number, batch) in enumerate(batches, 1):
        if sampling.samples == "micro_batch":
            taken += 1
            grads = micro_batch_gradients(model, layers, calibration, batch)
            yield Packet(grads, number, used)
        else:
            for grads in examples(batch):
                some = [g if g is None else g[: quota - taken] for g in grads]
                taken += max((len(g) for g in some if g is not None), default=1)
                yield Packet(some, number, used)
                if taken >= quota:
                    break
        if taken >= quota:
            return


def _flags(grads: Grads) -> Tensor:
    """(layers, samples), with one transfer from the device."""
    size = max((len(g) for g in grads if g is not None), default=1)
    sizes = [None if g is None else _sizes(g) for g in grads]
    there = [t for t in sizes if t is not None]
    known = iter(torch.stack(there).cpu() if there else ())
    flags = torch.full((len(grads), size), NONE)
    for i, t in enumerate(sizes):
        if t is not None:
            found = next(known)
            flags[i] = torch.where(found.isfinite(), torch.where(found == 0, ZERO, GOOD), BAD)
    return flags


def _sizes(g: Tensor) -> Tensor:
    """(samples,) sums of magnitudes: zero only for zeros, finite only where all is."""
    dtype = torch.promote_types(g.dtype, torch.float32)
    sums: Tensor = torch.linalg.vector_norm(g.flatten(1), ord=1, dim=1, dtype=dtype)
    return sums


def _max_over_ranks(flags: Tensor) -> Tensor:
    ranks = all_ranks()
    table = torch.zeros(ranks.world_size, *flags.shape)
    table[ranks.rank] = flags
    return ranks.all_reduce(table).amax(0)


class _Exchange:
    """Hands each rank, of the gradients of all ranks, the rows that it works on."""

    def __init__(self, local_rows: Sequence[Rows], everyone: Ranks, at_once: int) -> None:
        self.local_rows, self.everyone, self.at_once = local_rows, everyone, at_once
        self.sharded = any_sharded([rows.layer for rows in local_rows])
        if everyone.group is None:
            return
        table = torch.zeros(everyone.world_size, len(local_rows), 2, dtype=torch.int64)
        table[everyone.rank] = torch.tensor([[rows.begin, rows.end] for rows in local_rows])
        self.cuts = everyone.all_reduce(table).tolist()

    def __call__(self, packet: Packet | None) -> Iterator[tuple[list[Tensor], Tensor, str]]:
        """(samples, rows, cols) of each layer, their flags, and where they are from."""
        if self.everyone.group is None:
            assert packet is not None
            flags = _flags(packet.grads)
            if self.sharded:  # what is bad in the rows of one rank is left out on all
                flags = _max_over_ranks(flags)
            yield self._whole(packet.grads, flags.shape[1]), flags, f"batch {packet.batch}"
            return
        for rank, got in enumerate(self.everyone.all_to_all(self._messages(packet))):
            count = len(self.local_rows) * self.at_once
            flags = got[-count - 1 : -1].view(len(self.local_rows), self.at_once).cpu()
            yield self._unpacked(got), flags, f"batch {int(got[-1])} of rank {rank}"

    def _whole(self, grads: Grads, size: int) -> list[Tensor]:
        """This rank's rows; zeros where there is no gradient."""
        parts = []
        for rows, g in zip(self.local_rows, grads, strict=True):
            if g is None:
                cols = rows.layer.matrix_shape()[1]
                parts.append(rows.layer.local.new_zeros(size, len(rows), cols))
            elif len(rows) == g.shape[1]:
                parts.append(g)
            else:  # a copy, since a view would keep all rows in memory
                parts.append(g[:, rows.begin : rows.end].clone())
        return parts

    def _messages(self, packet: Packet | None) -> list[Tensor]:
        """To each rank: its rows of every layer, the flags, the number of the batch."""
        layers = [rows.layer for rows in self.local_rows]
        device = layers[0].local.device
        exact = any(layer.weight.dtype == torch.float64 for layer in layers)
        dtype = torch.float64 if exact else torch.float32
        flags = torch.full((len(layers), self.at_once), ABSENT, dtype=dtype)
        wholes = []
        grads: Grads = [None] * len(layers) if packet is None else packet.grads
        if packet is not None:
            found = _flags(grads)
            flags[:, : found.shape[1]] = found
        for layer, g in zip(layers, grads, strict=True):
            whole = torch.zeros(self.at_once, *layer.matrix_shape(), dtype=dtype, device=device)
            if g is not None:
                whole[: len(g)] = g
            wholes.append(whole)
        number = torch.tensor([0.0 if packet is None else packet.batch], dtype=dtype)
        note = torch.cat([flags.flatten(), number]).to(device)
        return [
            torch.cat(
                [w[:, b:e].flatten() for w, (b, e) in zip(wholes, cuts, strict=True)] + [note]
            )
            for cuts in self.cuts
        ]

    def _unpacked(self, got: Tensor) -> list[Tensor]:
        parts, at = [], 0
        for rows in self.local_rows:
            shape = self.at_once, len(rows), rows.layer.matrix_shape()[1]
            size = shape[0] * shape[1] * shape[2]
            parts.append(got[at : at + size].view(shape))
            at += size
        return parts


def _update(
    stats: Mapping[Rows, Statistic],
    grads: Sequence[Tensor],
    flags: Tensor,
    alive: Sequence[Tensor | None],
) -> None:
    """Add the good samples, where there are weights."""
    for (rows, stat), g, flag, mask in zip(stats.items(), grads, flags, alive, strict=True):
        good = (flag != BAD) & (flag != ABSENT)
        taken = g if bool(good.all()) else g[good.to(g.device)]
        take_in(stat, taken if mask is None else taken * mask, rows.layer.name)


def _alive(rows: Rows) -> Tensor | None:
    """Where the weights are not zero; None if none is."""
    w = rows.layer.local
    if int(w.count_nonzero()) == w.numel():
        return None
    return rows.layer.matrix(w)[rows.begin : rows.end] != 0


def _common_sampling(stats: Iterable[Statistic]) -> Sampling:
    found = {stat.sampling for stat in stats if stat.sampling is not None}
    if len(found) != 1:
        raise ValueError(
            f"statistics of one pass sample alike, and these want {sorted(map(str, found))}; give "
            "those of all layers one sampling"
        )
    return found.pop()


def measure_gradients(
    model: nn.Module,
    stats: Mapping[Rows, Statistic],
    calibration: Calibration,
    begin: int = 0,
    everyone: Ranks | None = None,
    title: str = "gradients",
) -> tuple[int, dict[Layer, str]]:
    """Fill the statistics from gradients. Returns how many batches that took, and silent layers.

    Those are layers whose gradients are all zero, on all ranks, with a clause that says how that is
    (`GradientChecks.finish`). Gradients are those of the loss in evaluation mode, times the present
    mask. ``num_grads`` is dealt out to the data-parallel ranks. With `everyone`, each rank hands to
    each of the others the rows of its gradients that they work on, so that all statistics see the
    gradients of all ranks.

    Raises ValueError for empty data, and if more than 5 % of a layer's gradients are NaN or
    infinite.
    """
    everyone = everyone or Ranks()
    layers = [rows.layer for rows in stats]
    sampling = _common_sampling(stats.values())
    ranks = Ranks() if any_sharded(layers) else all_ranks()
    quota = (sampling.num_grads + ranks.rank) // ranks.world_size
    if everyone.group is None:
        quota = max(1, quota)
    several = AT_ONCE if everyone.group is None else AT_ONCE // 4  # they travel with all rows
    at_once = 1 if sampling.samples == "micro_batch" else several
    alive = [_alive(rows) for rows in stats]
    exchange = _Exchange(list(stats), everyone, at_once)
    ranked = exchange.sharded or everyone.group is not None  # there are collectives in each round
    apart = Ranks() if ranked else all_ranks()
    tally = GradientChecks(layers, sampling.num_grads if everyone.group else quota, apart)
    last = 0
    with (
        apart.raise_on_all_ranks(),
        undisturbed(model, calibration),
        gradients_on(model, layers),
        counted_inputs(layers) as inputs,
    ):
        packets = _packets(model, layers, calibration, sampling, begin, quota, at_once)
        rounds = track(
            lockstep(packets, everyone, all_needed=False), title, total=-(-quota // at_once)
        )
        for packet in rounds:
            last = last if packet is None else packet.used
            with no_error_sync(when=ranked):
                for grads, flags, where in exchange(packet):
                    tally.add(flags, where)
                    with torch.autocast(layers[0].local.device.type, enabled=False):
                        _update(stats, grads, flags, alive)
    return last, tally.finish(inputs)
