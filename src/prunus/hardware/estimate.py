"""`estimate`: what the zeros of a model are worth in memory, in multiplications, and on EIE."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from prunus import formats
from prunus.core.layers import Layer, all_layers
from prunus.core.wrappers import unwrap
from prunus.hardware.activity import Activity, measure_activity, stack_samples
from prunus.hardware.eie import Machine, run_all
from prunus.hardware.energy import ARRAY_POWER, LABEL, layer_energy
from prunus.hardware.tables import Table

FORMS = ("dense", "bitmask", "csr", "csc", "4x4", "2:4", "eie")
_LOSSLESS = FORMS[:-1]


@dataclass(frozen=True)
class LayerEstimate:
    """One layer's weights, and what a forward pass of the example does with them."""

    name: str
    kind: str
    rows: int
    columns: int
    density: float
    bits: dict[str, int]
    """format -> bits; formats that cannot hold the layer are missing"""
    macs: int | None = None
    """None where the pass did not call the layer as a module"""
    effective_macs: int | None = None
    input_sparsity: float | None = None
    energy_dense: float | None = None
    """pJ, at 45 nm: every multiplication, and the dense weights once from DRAM"""
    energy_sparse: float | None = None
    """pJ, at 45 nm: effective multiplications, and the weights in their smallest format"""
    eie_cycles: int | None = None
    eie_load_balance: float | None = None
    eie_real_work: float | None = None

    @property
    def smallest(self) -> str:
        """The format that holds the weights as they are in the fewest bits."""
        return min((form for form in _LOSSLESS if form in self.bits), key=self.bits.__getitem__)


@dataclass(frozen=True)
class Estimate:
    """What `estimate` found. Prints as a table; see `to_json`, `plot` and `report`.

    >>> found = prunus.estimate(nn.Linear(64, 64), torch.randn(4, 64))
    >>> [layer.macs for layer in found.layers]
    [16384]
    """

    layers: list[LayerEstimate]
    machine: Machine
    other_bits: int
    """parameters and buffers that are not the weight of a layer"""

    def total(self, field: str) -> float:
        """The sum of a field over the layers that have it."""
        return sum(getattr(layer, field) or 0 for layer in self.layers)

    def total_bits(self, form: str) -> int:
        """Of all layers in one format, dense where it does not fit; without other parameters."""
        return sum(layer.bits.get(form, layer.bits["dense"]) for layer in self.layers)

    @property
    def eie_seconds(self) -> float:
        return self.total("eie_cycles") / self.machine.clock

    @property
    def eie_joules(self) -> float:
        """At the published power of 64 elements, in proportion."""
        return ARRAY_POWER * self.machine.elements / 64 * self.total("eie_cycles") / 800e6

    def table(self) -> Table:
        header = (
            *("layer", "shape", "density", "KiB", "smallest", "MACs", "effective"),
            *("inputs 0", "µJ dense", "µJ sparse", "EIE cycles", "balance"),
        )
        rows = [*map(_cells, self.layers), self._sums()]
        return Table("estimate", header, rows, self.notes())

    def _sums(self) -> list[str]:
        smallest = sum(layer.bits[layer.smallest] for layer in self.layers)
        weights = sum(layer.rows * layer.columns for layer in self.layers)
        nonzero = sum(layer.density * layer.rows * layer.columns for layer in self.layers)
        dense = self.total_bits("dense")
        return [
            *("all", "", f"{nonzero / max(1, weights):.3f}", _kib(dense), _kib(smallest)),
            *(_count(self.total("macs")), _count(self.total("effective_macs")), ""),
            *(f"{self.total(f) / 1e6:.2f}" for f in ("energy_dense", "energy_sparse")),
            *(_count(self.total("eie_cycles")), ""),
        ]

    def notes(self) -> list[str]:
        machine = self.machine
        sums = ", ".join(f"{form} {_kib(self.total_bits(form))}" for form in FORMS)
        lines = [
            f"KiB of all layers by format: {sums}; other parameters {_kib(self.other_bits)}",
            f"energy: {LABEL}; weights are read once from DRAM, activations are not counted",
            f"EIE with {machine.elements} elements at {machine.clock / 1e6:.0f} MHz: "
            f"{1e6 * self.eie_seconds:.1f} µs, {1e6 * self.eie_joules:.2f} µJ a forward pass "
            "(a model of the published machine; its format needs 4-bit shared weights)",
            "how fast this machine runs the model is measured by `prunus bench`, not here",
        ]
        missing = [layer.name for layer in self.layers if layer.macs is None]
        if missing:
            lines.append(f"not called as modules, so sizes only: {', '.join(missing)}")
        return lines

    def __rich_console__(self, console: Any, options: Any) -> Any:
        yield from self.table().__rich_console__(console, options)

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table().html()

    def to_json(self) -> str:
        """Everything, with the sums."""
        fields = ("macs", "effective_macs", "energy_dense", "energy_sparse", "eie_cycles")
        sums: dict[str, Any] = {field: self.total(field) for field in fields}
        sums["bits"] = {form: self.total_bits(form) for form in FORMS}
        return json.dumps({**dataclasses.asdict(self), "total": sums, "energy": LABEL}, indent=2)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw bytes by format, multiplications and zeros; needs the extra ``report``."""
        from prunus.hardware.plots import draw_estimate

        draw_estimate(self, path)

    def report(self, directory: str | os.PathLike[str]) -> Path:
        """Write ``estimate.json``, ``estimate.png`` and the page ``estimate.html``, its path."""
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        (target / "estimate.json").write_text(self.to_json() + "\n")
        self.plot(target / "estimate.png")
        page = target / "estimate.html"
        page.write_text(self.table().page("estimate.png"), encoding="utf-8")
        return page


def estimate(
    model: nn.Module,
    example_inputs: Any,
    *,
    machine: Machine | None = None,
    vectors: int = 8,
    forms: Sequence[str] = FORMS,
) -> Estimate:
    """What a model's zeros are worth, for one forward pass of ``example_inputs``.

    Sizes are exact, multiplications and activation zeros are counted on the example, and energy and
    cycles are those of published hardware. EIE's cycles are the mean of ``vectors`` input vectors
    for each call, times all its vectors. Nothing here predicts the CPU or GPU at hand.

    ``example_inputs`` is a tensor, a tuple of positional or a mapping of keyword arguments.

    >>> import torch
    >>> import prunus
    >>> from prunus.hardware import estimate
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(),
    ...                             torch.nn.Linear(64, 10))
    >>> _ = prunus.prune(model, "magnitude", sparsity=0.9, layers=["0", "2"])
    >>> result = estimate(model, torch.randn(4, 64))
    >>> [(layer.name, layer.macs) for layer in result.layers]
    [('0', 16384), ('2', 2560)]
    """
    machine = machine or Machine()
    if vectors < 1:
        raise ValueError(f"vectors={vectors}; use at least 1")
    activity = measure_activity(model, example_inputs, vectors)
    layers = list(all_layers(model))
    rows = [_layer(layer, activity.get(layer.name), machine, forms) for layer in layers]
    state = unwrap(model).state_dict(keep_vars=True).values()
    weights = {id(layer.weight) for layer in layers}
    # what torch.ao has quantized holds tuples of tensors
    values = [x for value in state for x in (value if isinstance(value, tuple) else (value,))]
    tensors = {id(t): t for t in values if isinstance(t, Tensor)}
    other = sum(8 * t.nbytes for t in tensors.values() if id(t) not in weights)
    return Estimate(rows, machine, other)


def _layer(
    layer: Layer, activity: Activity | None, machine: Machine, forms: Sequence[str]
) -> LayerEstimate:
    matrix = layer.matrix(layer.local)
    mask = formats.matrix_mask(matrix)
    bits = {}
    for form in dict.fromkeys(("dense", *forms)):
        options = {"elements": machine.elements, "index_bits": machine.index_bits}
        try:
            bits[form] = formats.size(matrix, form, **(options if form == "eie" else {}))
        except ValueError:
            continue  # a block or N:M that the layer's shape or zeros do not have
    rows, columns = layer.matrix_shape()
    density = float(mask.mean()) if mask.size else 0.0
    row = LayerEstimate(layer.name, layer.kind, rows, columns, density, bits)
    if activity is None:
        return row
    dtype = matrix.dtype
    row = dataclasses.replace(
        row,
        macs=activity.macs,
        effective_macs=activity.effective_macs,
        input_sparsity=activity.input_sparsity,
        energy_dense=layer_energy(activity.macs, bits["dense"], dtype),
        energy_sparse=layer_energy(activity.effective_macs, bits[row.smallest], dtype),
    )
    return _on_eie(row, mask, activity, machine) if activity.samples else row


def _on_eie(
    row: LayerEstimate, mask: formats.Mask, activity: Activity, machine: Machine
) -> LayerEstimate:
    runs = run_all(machine, mask, stack_samples(activity))
    cycles = sum(r.cycles for r in runs)
    entries = sum(r.entries for r in runs)
    return dataclasses.replace(
        row,
        eie_cycles=round(cycles / len(runs) * activity.vectors),
        eie_load_balance=entries / max(1, machine.elements * cycles),
        eie_real_work=sum(r.weights for r in runs) / max(1, entries),
    )


def _cells(layer: LayerEstimate) -> list[str]:
    def show(value: float | None, text: str) -> str:
        return "" if value is None else text.format(value)

    return [
        *(layer.name, f"{layer.rows}x{layer.columns}", f"{layer.density:.3f}"),
        *(_kib(layer.bits["dense"]), f"{layer.smallest} {_kib(layer.bits[layer.smallest])}"),
        *("" if n is None else _count(n) for n in (layer.macs, layer.effective_macs)),
        show(layer.input_sparsity, "{:.3f}"),
        *("" if e is None else f"{e / 1e6:.2f}" for e in (layer.energy_dense, layer.energy_sparse)),
        "" if layer.eie_cycles is None else _count(layer.eie_cycles),
        show(layer.eie_load_balance, "{:.2f}"),
    ]


def _kib(bits: float) -> str:
    return f"{bits / 8192:.1f}"


def _count(n: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= 10 * size:
            return f"{n / size:.1f}{unit}"
    return f"{n:.0f}"
