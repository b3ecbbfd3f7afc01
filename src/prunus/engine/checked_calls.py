"""Calls of a pruner whose answers are checked: what does not fit is an error that names the class.

Methods from outside the package work on a copy of the weights, so that one that writes to them by
mistake is told so, and the model is as it was. Ours are tested instead, and cost nothing more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from prunus.calibration.memory_plan import Rows
from prunus.core.patterns import Pattern
from prunus.core.ranks import Ranks
from prunus.core.selection import FLOATS
from prunus.pruners import JointPruner, Pruner, ScorePruner
from prunus.stats import Statistic


def scores_of(
    pruner: ScorePruner, rows: Rows, stat: Statistic | None, pattern: Pattern, ranks: Ranks
) -> Tensor:
    """(rows, cols) the pruner's scores. Raises ValueError for what are none."""
    with _weights(pruner, "scores", rows) as w:
        scores = pruner.scores(w, stat, pattern, ranks)
    _check_float(pruner, "scores", scores, rows)
    return scores


def refined(
    pruner: ScorePruner, rows: Rows, stat: Statistic | None, mask: Tensor, pattern: Pattern
) -> Tensor:
    """(rows, cols) the keep-mask after the pruner's `refine`."""
    with _weights(pruner, "refine", rows) as w:
        better = pruner.refine(w, stat, mask, pattern)
    _check_mask(pruner, "refine", better, rows)
    return better


def rebuilt(pruner: ScorePruner, rows: Rows, stat: Statistic | None, mask: Tensor) -> Tensor:
    """(rows, cols) the new weights for a keep-mask."""
    with _weights(pruner, "rebuild", rows, mask) as w:
        new = pruner.rebuild(w, stat, mask)
    _check_float(pruner, "rebuild", new, rows)
    return new


def solved(
    pruner: JointPruner,
    rows: Rows,
    stat: Statistic | None,
    pattern: Pattern,
    drop: int,
    ranks: Ranks,
) -> tuple[Tensor, Tensor]:
    """(rows, cols) new weights and keep-mask."""
    with _weights(pruner, "solve", rows) as w:
        result = pruner.solve(w, stat, pattern, drop, ranks)
    if not isinstance(result, tuple) or len(result) != 2:
        raise _error(pruner, "solve", rows, "gives no pair", "a new weight and a keep-mask")
    _check_float(pruner, "solve", result[0], rows)
    _check_mask(pruner, "solve", result[1], rows)
    return result


@contextlib.contextmanager
def unchanged(method: object, tensors: Sequence[Tensor], who: str) -> Iterator[list[Tensor]]:
    """Tensors for a method to read: copies, for one from outside the package.

    Raises ValueError, beginning with ``who``, if it has written to them.
    """
    if type(method).__module__.startswith("prunus."):
        yield list(tensors)
        return
    copies = [t.clone() for t in tensors]
    versions = [_version(t) for t in copies]
    yield copies
    if [_version(t) for t in copies] != versions:
        raise ValueError(
            f"{who} changes what it is given in place; return new tensors, as from .clone(); "
            "nothing was pruned"
        )


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


@contextlib.contextmanager
def _weights(pruner: Pruner, part: str, rows: Rows, mask: Tensor | None = None) -> Iterator[Tensor]:
    """The weights that the pruner gets. Raises ValueError if it has written to them."""
    w = rows.matrix()
    if type(pruner).__module__.startswith("prunus."):
        yield w
        return
    w = w.clone()
    args = {"w": w} if mask is None else {"w": w, "mask": mask}
    versions = {name: _version(t) for name, t in args.items()}
    yield w
    for name, t in args.items():
        if _version(t) != versions[name]:
            message = f"changes {name!r} in place"
            raise _error(pruner, part, rows, message, f"a new tensor, as from {name}.clone()")


def _check_float(pruner: Pruner, part: str, t: object, rows: Rows) -> None:
    wrong = _misfit(t, rows)
    if not wrong and isinstance(t, Tensor) and t.dtype not in FLOATS:
        wrong = f"gives {t.dtype}"
    if wrong:
        raise _error(pruner, part, rows, wrong, f"floats of shape {_shape(rows)}")


def _check_mask(pruner: Pruner, part: str, t: object, rows: Rows) -> None:
    wrong = _misfit(t, rows)
    if not wrong and isinstance(t, Tensor) and t.dtype != torch.bool:
        wrong = f"gives a mask of {t.dtype}"
    if wrong:
        raise _error(pruner, part, rows, wrong, f"a mask of booleans of shape {_shape(rows)}")


def _misfit(t: object, rows: Rows) -> str:
    if not isinstance(t, Tensor):
        return f"gives {type(t).__name__}"
    if tuple(t.shape) != _shape(rows):
        return f"gives shape {tuple(t.shape)}"
    if t.layout is not torch.strided:
        return f"gives a tensor of layout {t.layout}"
    return ""


def _shape(rows: Rows) -> tuple[int, int]:
    return len(rows), rows.layer.matrix_shape(tuple(rows.layer.local.shape))[1]


def _error(pruner: Pruner, part: str, rows: Rows, wrong: str, remedy: str) -> ValueError:
    return ValueError(
        f"pruner {pruner.name!r}: {type(pruner).__name__}.{part} {wrong} for {rows.layer.name}; "
        f"return {remedy}; nothing was pruned"
    )
