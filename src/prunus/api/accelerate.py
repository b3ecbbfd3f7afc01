"""`accelerate`: a pruned model runs each layer in the form that is the fastest here."""

from __future__ import annotations

import os
import platform
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunus.core.names import few
from prunus.core.progress import track
from prunus.execution.inference import (
    DENSE,
    Chooser,
    LayerExecution,
    Sparse,
    become_sparse,
    input_rows,
    restore,
    targets,
)
from prunus.report.records import FILE, Recorder, is_main, read_records
from prunus.report.summary import in_units
from prunus.report.tables import Printable


@dataclass
class Accelerated(Printable):
    """How each pruned layer of a model runs now, with what was measured.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> accelerated = prunus.accelerate(model, torch.randn(2, 8))
    >>> accelerated.verdict
    'nothing accelerates this here: no layer has zeros; prune the model first'
    >>> accelerated.restore()
    """

    model: nn.Module = field(repr=False)
    rows: list[LayerExecution]
    machine: str
    """processor, threads and torch version of the measurement"""
    title = "how the pruned layers run"

    @property
    def forms(self) -> Counter[str]:
        """How many layers run in which form, ``dense`` among them."""
        return Counter(row.form for row in self.rows)

    def restore(self) -> None:
        """Let the model run dense again: classes, Parameters and weights as they were."""
        restore(self.model)

    def header(self) -> Sequence[str]:
        return "layer", "pattern", "sparsity", "rows", "ms", "bytes", "runs as"

    def cells(self) -> Iterable[Sequence[str]]:
        for row in self.rows:
            forms = [DENSE, *row.measured]
            yield (
                *(row.name, row.pattern, f"{row.sparsity:.4f}", str(row.rows or "")),
                "\n".join(f"{row.ms[name]:.3f} {name}" for name in forms if row.ms),
                "\n".join(in_units(row.nbytes[name]) for name in forms),
                row.form,
            )

    def notes(self) -> Sequence[str]:
        message: dict[str, list[str]] = {}
        for row in self.rows:
            if row.why:
                message.setdefault(row.why, []).append(row.name)
        lines = [f"dense: {few(names, 4)}: {why}" for why, names in message.items()]
        return [*lines, self.verdict, self.machine]

    @property
    def verdict(self) -> str:
        """One sentence: how many layers run sparse, and what is saved."""
        sparse = [row for row in self.rows if row.form != DENSE]
        if not self.rows:
            return "nothing accelerates this here: no layer has zeros; prune the model first"
        if not sparse:
            return "nothing accelerates this here"
        before, after = (
            sum(row.nbytes[form(row)] for row in sparse)
            for form in (lambda row: DENSE, lambda row: row.form)
        )
        return (
            f"{len(sparse)} of {len(self.rows)} pruned layers run sparse; their weights take "
            f"{in_units(after)}, dense {in_units(before)}"
        )

    def report(self, directory: str | os.PathLike[str]) -> None:
        """Add this table to the run's records there and write its ``report.html`` anew.

        An event ``execution`` is appended to ``records.jsonl``, which begins with it if there was
        none. Raises ImportError without the extra ``report``; the event is then recorded.
        """
        from prunus.report import write_report

        if not is_main():
            return
        recorder = Recorder()
        if (Path(directory) / FILE).is_file():
            recorder.events = read_records(directory)
        recorder.events.append(self.event(max((e["step"] for e in recorder.events), default=0)))
        recorder.save(directory)
        write_report(directory)

    def event(self, step: int) -> dict[str, Any]:
        """What `report` writes into the records."""
        return {
            "event": "execution",
            "step": step,
            "time": time.time(),
            "machine": self.machine,
            "verdict": self.verdict,
            "layers": [{**asdict(row), "why": row.why} for row in self.rows],
        }


def machine(device: torch.device) -> str:
    """One line on the processor that computes, and on torch."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    name, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8").splitlines()
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else name
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def accelerate(model: nn.Module, example: Any = None, *, rows: int = 128) -> Accelerated:
    """Run each pruned layer in the form that is the fastest on this machine, for inference.

    Every Linear (and transformers' Conv1D) that has zeros is timed dense and in the forms that its
    zeros allow: on CPUs compressed rows and square blocks, on GPUs 2:4. It takes a form only if
    that is faster by more than the noise; else it stays as it is, and the result says why. Weights
    come out of a form as they went in, to the bit: the model's `state_dict` is that of the dense
    model, and `load_state_dict`, `copy.deepcopy` and `prunus.save` work. Where the model is moved
    to another device or dtype its layers are dense again, with a warning. A second call measures
    anew.

    ``example`` is a batch as `Calibration` takes it. One forward pass on it in evaluation mode
    tells how many rows (batch times tokens) each layer is given, and which layers are never called;
    without it, all are measured with ``rows``. Call it as the model will run: with the same number
    of threads, and within the `torch.autocast` that it will run in.

    Raises what the forward pass raises, and ValueError for ``rows`` below 1; the model is then as
    it was. The backward pass of an accelerated layer raises RuntimeError, as does giving it another
    weight.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> result = prunus.prune(model, "magnitude", sparsity=0.9)
    >>> accelerated = prunus.accelerate(model, torch.randn(2, 8))
    >>> [row.name for row in accelerated.rows]
    ['0']
    """
    if rows < 1:
        raise ValueError(f"rows={rows}: a layer is given at least 1 row; use batch times tokens")
    with torch.inference_mode(False), torch.no_grad():
        former = {m: m._held for m in model.modules() if isinstance(m, Sparse)}
        restore(model)
        try:
            table = _accelerate(model, example, rows)
        except BaseException:
            restore(model)
            for module, held in former.items():
                become_sparse(module, held.stored, held.rows)
            raise
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return Accelerated(model, table, machine(device))


def _accelerate(model: nn.Module, example: Any, rows: int) -> list[LayerExecution]:
    found = list(targets(model))
    rows_by_layer: Mapping[Any, int] = {}
    if example is not None:
        layers = [target.layer for target in found if not target.refused]
        rows_by_layer = input_rows(model, layers, example)
    chooser, table = Chooser(), []
    for target in track(found, "measuring the layers"):
        rows_seen = rows if example is None else rows_by_layer.get(target.layer)
        row, stored = chooser.choose(target, rows_seen)
        if stored is not None and rows_seen is not None:
            become_sparse(target.layer.module, stored, rows_seen)
        table.append(row)
    return table
