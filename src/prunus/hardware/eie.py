"""A cycle model of EIE, the accelerator that skips zero weights and zero activations.

Song Han et al., "EIE: Efficient Inference Engine on Compressed Deep Neural Network", ISCA 2016,
https://arxiv.org/abs/1602.01528. A leading nonzero detector reads the activations, as many at a
time as there are elements, and broadcasts one that is not zero in each cycle to a queue in every
element, unless one of the queues is full. An element takes the next activation from its queue,
reads where that column of its rows begins and ends, and then works off one stored entry a cycle.

With k the k-th activation that is not zero, n[p, k] the entries that element p stores for it, and D
what a queue holds::

    broadcast[k] = max(broadcast[k-1] + 1 + bubble[k],  max over p of start[p, k-D] + 1)
    start[p, k]  = max(free[p], broadcast[k] + 1)
    free[p]      = start[p, k] + max(n[p, k], 1)

Moving on by r groups of activations costs r cycles (the bubble), and one less after a group whose
last activation was broadcast. Where D is "FIFO depth - 1", this gives the cycle counts of the
authors' simulator, https://github.com/RalphMao/EIE-simulator, to the cycle; see `docs/hardware.md`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prunus.formats import Mask, Reset, entry_counts

PIPELINE = 7
"""cycles from an entry's turn to its sum's arrival in memory"""
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Machine:
    """An EIE, by default the one of the paper."""

    elements: int = 64
    """processing elements, each with the rows p, p + elements, ..."""
    queue: int = 8
    """depth of the activation queues; one place of it is never filled"""
    index_bits: int = 4
    clock: float = 800e6
    """cycles a second"""
    reset: Reset = "column"

    def __post_init__(self) -> None:
        if self.elements < 1:
            raise ValueError(f"elements={self.elements}; use at least 1")
        if self.queue < 2:
            raise ValueError(f"queue={self.queue}; one place stays free, so use at least 2")
        if not 1 <= self.index_bits <= 16:
            raise ValueError(f"index_bits={self.index_bits}; use 1 to 16")


@dataclass(frozen=True)
class Execution:
    """One matrix-vector product on a machine."""

    machine: Machine
    cycles: int
    entries: int
    """entries worked off, virtual zeros included"""
    weights: int
    """nonzero weights that met a nonzero activation"""
    active: int
    """nonzero activations"""
    lines: int
    """reads of 8-entry lines of the matrix memory"""

    @property
    def seconds(self) -> float:
        return self.cycles / self.machine.clock

    @property
    def ideal_seconds(self) -> float:
        """Were the entries spread evenly, with no waiting."""
        return self.entries / self.machine.elements / self.machine.clock

    @property
    def load_balance(self) -> float:
        """Share of the cycles in which an element is at work, on average."""
        return self.entries / max(1, self.machine.elements * self.cycles)

    @property
    def real_work(self) -> float:
        """Share of the entries that are no virtual zeros."""
        return self.weights / max(1, self.entries)


def run(machine: Machine, mask: Mask, active: Mask) -> Execution:
    """One product of a (rows, columns) matrix and a vector, both given by what is not zero.

    >>> import numpy as np
    >>> from prunus import hardware
    >>> rng = np.random.default_rng(0)
    >>> layer, inputs = rng.random((1000, 4096)) < 0.25, rng.random(4096) < 0.4
    >>> execution = hardware.run(hardware.Machine(), layer, inputs)
    >>> 0.85 < execution.load_balance < 1
    True
    """
    return run_all(machine, mask, active[None])[0]


def run_all(machine: Machine, mask: Mask, active: Mask) -> list[Execution]:
    """Products with several vectors, one after the other; ``active`` is (vectors, columns)."""
    if mask.ndim != 2 or active.shape[1:] != mask.shape[1:]:
        raise ValueError(f"a {mask.shape} matrix takes no vectors of {active.shape[1:]}")
    counts = entry_counts(mask, machine.elements, machine.index_bits, machine.reset)
    cycles = count_cycles(counts, active, machine.queue - 1)
    entries, weights, lines = counts.sum(0), mask.sum(0), _lines(counts).sum(0)
    return [
        Execution(
            machine, int(c), int(entries[a].sum()), int(weights[a].sum()), int(a.sum()),
            int(lines[a].sum()),
        )
        for c, a in zip(cycles, active, strict=True)
    ]  # fmt: skip


def count_cycles(counts: Counts, active: Mask, capacity: int) -> Counts:
    """(vectors,) cycles of the recurrence above.

    ``counts`` is (elements, columns), ``active`` (vectors, columns), and a queue holds `capacity`
    activations.
    """
    elements = len(counts)
    work = np.maximum(counts.T, 1)
    columns, bubbles = _broadcasts(active, elements)
    each = active.sum(1)
    vectors, most = columns.shape
    broadcast = np.full(vectors, -1)
    free = np.zeros((vectors, elements), np.int64)
    last_start = np.zeros((most, vectors), np.int64)
    for k in range(most):
        broadcast = broadcast + 1 + bubbles[:, k]
        if k >= capacity:
            broadcast = np.maximum(broadcast, last_start[k - capacity] + 1)
        start = np.maximum(free, broadcast[:, None] + 1)
        last_start[k] = start.max(1)
        start += work[columns[:, k]]
        free = start if k < each.min() else np.where((k < each)[:, None], start, free)
    result: Counts = free.max(1) + PIPELINE
    return result


def _broadcasts(active: Mask, elements: int) -> tuple[Counts, Counts]:
    """(vectors, k) the column of the k-th broadcast, and cycles lost before it."""
    each = active.sum(1)
    vector, column = np.nonzero(active)
    nth = np.arange(len(column)) - np.repeat(np.cumsum(each) - each, each)
    columns = np.zeros((len(active), each.max(initial=0)), np.int64)
    columns[vector, nth] = column
    groups, places = np.divmod(columns, elements)
    bubbles = np.diff(groups, axis=1, prepend=0)
    bubbles[:, 1:] -= (bubbles[:, 1:] > 0) & (places[:, :-1] == elements - 1)
    return columns, bubbles


def _lines(counts: Counts, width: int = 8) -> Counts:
    """(elements, columns) lines of `width` entries that hold each column, wherever it begins."""
    ends = np.cumsum(counts, axis=1)
    begins = ends - counts
    touched: Counts = np.where(counts > 0, (ends - 1) // width - begins // width + 1, 0)
    return touched


def snake_order(mask: Mask, elements: int) -> npt.NDArray[np.int64]:
    """Which row to put where, so that every element has about the same work.

    Rows sorted by their weights are dealt to the elements to and fro. The outputs come in this
    order; permuting the columns of the layer that reads them costs nothing at run time.
    """
    order = np.argsort(-mask.sum(1), kind="stable")
    padded = np.append(order, np.full(-len(order) % elements, -1))
    deals = padded.reshape(-1, elements)
    full = len(order) // elements
    deals[1:full:2] = deals[1:full:2, ::-1]
    result: npt.NDArray[np.int64] = deals.reshape(-1)[: len(order)]
    return result
