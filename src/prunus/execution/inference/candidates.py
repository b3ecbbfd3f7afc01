"""All forms that a weight may take on this machine."""

from __future__ import annotations

from torch import Tensor

from prunus.execution.inference import forms, semi_structured
from prunus.execution.inference.forms import Spec


def candidates(matrix: Tensor, rows: int) -> tuple[list[Spec], dict[str, str]]:
    """What is worth measuring for a (outputs, inputs) weight and so many input rows.

    Also returns why the other forms are not, by their names.
    """
    if not bool(matrix.isfinite().all()):
        message = "the weight has NaN or infinities"
        return [], dict.fromkeys(("csr", "bsr", *semi_structured.NAMES), message)
    gpu, gpu_refused = semi_structured.candidates(matrix, rows)
    cpu, cpu_refused = forms.candidates(matrix)
    return [*gpu, *cpu], {**gpu_refused, **cpu_refused}
