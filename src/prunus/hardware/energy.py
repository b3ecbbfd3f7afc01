"""Energy at published 45 nm constants: a model of that technology, and of no machine at hand.

Arithmetic and memory: Mark Horowitz, "Computing's Energy Problem", ISSCC 2014, as table I of the
EIE paper (https://arxiv.org/abs/1602.01528) has it. Power of EIE: table II there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from prunus.hardware.eie import Execution

LABEL = "45 nm model, published constants"
SRAM_32_BITS, DRAM_32_BITS = 5.0, 640.0
"""pJ to read 32 bits from 32 KiB of SRAM, and from DRAM"""
_MULTIPLY_ADD = {"int8": 0.2 + 0.03, "int32": 3.1 + 0.1, "float16": 1.1 + 0.4, "float32": 3.7 + 0.9}


def multiply_add(dtype: torch.dtype) -> float:
    """pJ of one multiplication and one addition; types without a published figure as the next."""
    size = dtype.itemsize
    if dtype.is_floating_point:
        return _MULTIPLY_ADD["float16" if size <= 2 else "float32"]
    return _MULTIPLY_ADD["int8" if size == 1 else "int32"]


def layer_energy(macs: int, weight_bits: int, dtype: torch.dtype) -> float:
    """pJ of a layer whose weights are read once from DRAM: arithmetic and that read."""
    return macs * multiply_add(dtype) + weight_bits / 32 * DRAM_32_BITS


@dataclass(frozen=True)
class ElementPower:
    """Milliwatts of the parts of one processing element at 800 MHz, from table II."""

    matrix_read: float = 4.955
    pointer_read: float = 1.807
    arithmetic: float = 1.162
    activations: float = 1.122
    queue: float = 0.112

    @property
    def total(self) -> float:
        """Within a thousandth of the 9.157 mW that the table gives for the whole element."""
        return float(sum(vars(self).values()))


ARRAY_POWER = 0.590
"""watts of 64 elements with their leading nonzero detection, at 800 MHz"""


def eie_energy(execution: Execution) -> float:
    """Joules at the published power, whatever the elements do: power * cycles / clock."""
    elements = execution.machine.elements
    return ARRAY_POWER * elements / 64 * execution.cycles / 800e6


@dataclass(frozen=True)
class EventEnergy:
    """pJ of each event in an element, such that Alex-7 on 64 elements takes the published energy.

    The published power gives only sums; which event causes which part is our reading: a line read
    the matrix memory's, a broadcast the pointers' and the queue's, an entry the arithmetic's and
    the activations'.
    """

    line: float
    broadcast: float
    """in each element"""
    entry: float

    @classmethod
    def calibrated(cls, reference: Execution, power: ElementPower | None = None) -> EventEnergy:
        """Split the published energy of a run among its events."""
        power = power or ElementPower()
        elements = reference.machine.elements
        # what table II does not list of the array's power is shared out in proportion
        scale = ARRAY_POWER * 1e3 / (64 * power.total)
        picojoules = scale * elements * reference.cycles / 800e6 * 1e9
        per_entry = power.arithmetic + power.activations
        per_broadcast = power.pointer_read + power.queue
        return cls(
            power.matrix_read * picojoules / reference.lines,
            per_broadcast * picojoules / (reference.active * elements),
            per_entry * picojoules / reference.entries,
        )

    def joules(self, execution: Execution) -> float:
        broadcasts = execution.active * execution.machine.elements
        events = (execution.lines, broadcasts, execution.entries)
        each = (self.line, self.broadcast, self.entry)
        return 1e-12 * sum(n * pj for n, pj in zip(events, each, strict=True))
