"""What `shrink` returns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prunus.report.tables import Printable


@dataclass(frozen=True)
class Size:
    """Counted from a model and measured on it."""

    params: int
    macs: int
    bytes: int
    latency: float | None
    """milliseconds of a forward pass"""


@dataclass(frozen=True)
class Row:
    """Units of one group."""

    name: str
    kind: str
    before: int
    after: int
    exact: bool


@dataclass(frozen=True)
class Shrunk(Printable):
    """What was removed, and what it is worth."""

    rows: Sequence[Row]
    before: Size
    after: Size
    gone: Mapping[str, Sequence[int]]
    """group -> numbers of the units that were removed"""
    kept: Mapping[str, Mapping[int, Tensor]] = field(repr=False, default_factory=dict)
    """parameter -> axis -> what was kept of the tensor before; what `follow` needs"""
    attributes: Mapping[str, Mapping[str, Any]] = field(repr=False, default_factory=dict)
    """module -> attribute -> value, of those that changed"""
    remarks: Sequence[str] = ()

    title = "units that are left"

    def header(self) -> Sequence[str]:
        return ("group", "kind", "before", "after", "exact")

    def cells(self) -> Iterable[Sequence[str]]:
        for row in self.rows:
            exact = "yes" if row.exact else "no"
            yield row.name, row.kind, str(row.before), str(row.after), exact

    def notes(self) -> Sequence[str]:
        a, b = self.before, self.after
        lines = [
            f"parameters: {a.params:,} -> {b.params:,} ({_times(a.params, b.params)})",
            f"multiply-accumulates: {a.macs / 1e6:,.2f} M -> {b.macs / 1e6:,.2f} M "
            f"({_times(a.macs, b.macs)})",
            f"file: {a.bytes / 2**20:,.2f} MiB -> {b.bytes / 2**20:,.2f} MiB",
        ]
        if a.latency is not None and b.latency is not None:
            where = f"measured here, {torch.get_num_threads()} threads"
            lines += [
                f"forward pass: {a.latency:.2f} ms -> {b.latency:.2f} ms "
                f"({_times(a.latency, b.latency)}; {where})",
                "fewer multiply-accumulates promise more speed than a CPU gives; the measured "
                "line is what you get",
            ]
        return [*lines, *self.remarks]


def _times(before: float, after: float) -> str:
    return f"{before / max(after, 1e-12):.2f}x"


def stored_bytes(model: nn.Module) -> int:
    """What the weights take in a file, tied ones once."""
    found = {t.data_ptr() or id(t): t for t in model.state_dict().values() if isinstance(t, Tensor)}
    return sum(t.numel() * t.element_size() for t in found.values())
