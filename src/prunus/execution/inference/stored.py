"""A weight in a form, exactly: what comes back is what went in, to the bit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prunus.core.masks import pack, unpack
from prunus.execution.inference.forms import Form, Spec, as_stable

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Inexact(ValueError):  # noqa: N818
    """The form does not give the weight back as it was."""


@dataclass(frozen=True)
class Stored:
    """A matrix in a form, and how to bring another one into it."""

    spec: Spec
    form: Form
    signs: Tensor | None
    """one bit for each weight, set where it is a zero with a sign; None if there is none. A mask
    that multiplies leaves such zeros, and forms drop them with all others"""

    @classmethod
    def of(cls, matrix: Tensor, spec: Spec) -> Stored:
        """Raises Inexact if the form would change the matrix, RuntimeError if torch cannot."""
        with as_stable():
            form = spec.build(matrix)
        negative = (matrix == 0) & matrix.signbit()
        stored = cls(spec, form, pack(negative) if bool(negative.any()) else None)
        if not torch.equal(_bits(stored.dense()), _bits(matrix)):
            raise Inexact(f"{spec.name} does not give these weights back exactly")
        return stored

    def dense(self) -> Tensor:
        """(outputs, inputs), in new memory."""
        dense = self.form.dense()
        if self.signs is not None:
            dense[unpack(self.signs, dense.shape)] = -0.0
        return dense

    @property
    def nbytes(self) -> int:
        return self.form.nbytes + (0 if self.signs is None else self.signs.nbytes)


def _bits(matrix: Tensor) -> Tensor:
    return matrix.contiguous().view(_INTEGERS[matrix.element_size()])
