"""Whether a model's output depends on its input at all, tried on a batch of the data.

A network can lose every path from its input to its output although each of its layers keeps some
weights: where a layer reads only what the one before no longer writes, or where no unit is ever
active.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from prunus.calibration.batches import Batch, to_device
from prunus.calibration.calibration import Calibration, needs_all_ranks, undisturbed
from prunus.core.wrappers import unwrap

log = logging.getLogger("prunus")
CONSTANT = (
    "the output no longer depends on the input: different inputs give the same output, so no path "
    "of weights is left; lower the sparsity, exclude layers, or use an allocator such as "
    "'uniform' or 'erk'"
)
NO_INPUTS = {"attention_mask", "decoder_attention_mask", "head_mask", "labels", "position_ids"}
NO_INPUTS |= {"token_type_ids", "cu_seqlens", "cache_position"}
SAME = 1e-6
"""largest change of an output, as a share of the output, that rounding makes"""


class InputDependence:
    """Asks a model before and after it is pruned, on the first batch and on another one like it.

    Tells nothing where that cannot be tried: without data, with a ``forward`` of somebody's own
    (which returns a loss), of models that are sharded or have no weights yet, and of inputs that
    cannot be changed.
    """

    def __init__(self, model: nn.Module, calibration: Calibration | None) -> None:
        self.model, self.calibration = unwrap(model), calibration
        self.batches: tuple[Batch, Batch] | None = None
        self.before: bool | None = None
        """whether the output depended on the input when it was last asked, before pruning"""

    def ask_before(self) -> None:
        """To be called before pruning; asks once."""
        if self.before is None:
            self.before = self._depends()

    @property
    def lost(self) -> bool:
        """Whether the output depended on the input before, and does not now."""
        return self.before is True and self._depends() is False

    def _depends(self) -> bool | None:
        data, model = self.calibration, self.model
        if data is None or data.forward is not None or needs_all_ranks(model):
            return None
        if any(p.is_meta for p in model.parameters()):
            return None
        try:
            with undisturbed(model, data), torch.no_grad():
                self.batches = self.batches or _two(next(iter(data), None))
                if self.batches is None:
                    return None
                return _differ(*(_output(model, data, batch) for batch in self.batches))
        except Exception as error:  # other inputs may mean nothing to the model
            log.debug("whether the output depends on the input could not be tried: %s", error)
            return None


def _output(model: nn.Module, data: Calibration, batch: Batch) -> Any:
    """What the model puts out, not its loss."""
    torch.manual_seed(0)  # for models that draw numbers in evaluation, too
    if isinstance(batch, Mapping):
        cached = {"use_cache": False} if batch.get("use_cache") else {}
        return model(**to_device({**batch, **cached}, next(model.parameters()).device))
    return replace(data, loss_fn=None).run(model, batch)


def _two(batch: Batch) -> tuple[Batch, Batch] | None:
    """The batch, and one with other inputs of the same kind; None if there is nothing to change.

    The same examples the other way round, where there are several; else numbers with as much noise
    as they vary, and indices in another order.
    """
    pair = isinstance(batch, tuple | list)
    if pair and not batch:
        return None
    inputs = batch[0] if pair else batch
    for change in (_reversed, _disturbed):
        if (other := _changed(inputs, change)) is None:
            continue
        if not pair:
            return batch, other
        parts = [other, *batch[1:]]
        return batch, type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return None


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same with all inputs in it changed; None where that changes nothing."""
    if isinstance(value, Mapping):
        parts = {k: _changed(v, change) for k, v in value.items() if not _is_mask(k, change)}
        parts = {k: v for k, v in parts.items() if v is not None}
        return {**value, **parts} if parts else None
    if isinstance(value, tuple | list):
        items = [_changed(item, change) for item in value]
        if all(item is None for item in items):
            return None
        return type(value)(v if c is None else c for v, c in zip(value, items, strict=True))
    if not isinstance(value, Tensor) or not value.numel() or not value.dim():
        return None
    other = change(value)
    return None if torch.equal(other, value) else other


def _is_mask(name: str, change: Callable[[Tensor], Tensor]) -> bool:
    """Whether this is no input of its own; with its example it is turned round all the same."""
    return change is _disturbed and name in NO_INPUTS


def _reversed(t: Tensor) -> Tensor:
    return t.flip(0)


def _disturbed(t: Tensor) -> Tensor:
    if not t.is_floating_point():
        return t.flip(-1)
    noise = torch.randn(t.shape, generator=torch.Generator().manual_seed(0)).to(t)
    spread = t.std(correction=0)
    return t + noise * torch.where(spread > 0, spread, 1)


def _tensors(output: Any) -> list[Tensor]:
    """All floating tensors of an output."""
    if isinstance(output, Tensor):
        return [output.detach()] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, tuple | list):
        return [t for item in output for t in _tensors(item)]
    return []


def _differ(first: Any, second: Any) -> bool | None:
    """Whether two outputs are different; None where there is nothing to compare."""
    pairs = list(zip(_tensors(first), _tensors(second), strict=True))
    if not pairs:
        return None
    for a, b in pairs:
        if a.shape != b.shape or not torch.isfinite(a).all() or not torch.isfinite(b).all():
            return True
        if a.numel() and float((a - b).abs().max()) > SAME * float(a.abs().max()):
            return True
    return False
