"""Whether gradients of examples can be told from one pass over their batch."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from prunus.calibration.batches import Batch, tensors_in
from prunus.calibration.calibration import Calibration

IGNORED = -100  # the label that torch's losses leave out


def size_of(batch: Batch) -> int:
    """Examples in a batch: the length of its first tensor.

    Raises ValueError if it has none.
    """
    for tensor in tensors_in(batch):
        if tensor.dim():
            return len(tensor)
    raise ValueError("samples='example' needs batches of tensors, to take the examples apart")


def example(batch: Batch, i: int, size: int) -> Batch:
    """The batch that has only its i-th example."""
    if isinstance(batch, Tensor):
        return batch[i : i + 1] if batch.dim() and len(batch) == size else batch
    if isinstance(batch, Mapping):
        return {key: example(value, i, size) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        items = [example(item, i, size) for item in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    return batch


def telling(batch: Batch, size: int) -> list[int]:
    """Examples to look at: some, and those with the most and the fewest labels and padding."""
    found = {0, size // 2, size - 1}
    for t in tensors_in(batch):
        if t.dim() > 1 and len(t) == size and not t.is_floating_point() and not t.is_complex():
            for value in (IGNORED, 0):
                counts = (t == value).flatten(1).sum(1)
                found |= {int(counts.argmin()), int(counts.argmax())}
    return sorted(found)


class Watch(TorchFunctionMode):
    """While a batch runs: how often weights are used, and what the loss function is given.

    A weight that is used as often as its module is called is used there alone. And a loss
    function can be asked again, for each example of the output that the model has given already:
    for far less than another pass.
    """

    def __init__(self, calibration: Calibration, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.uses: Counter[int] = Counter()
        self._weights = {id(w) for w in weights}
        self._loss_fn = calibration.loss_fn if calibration.forward is None else None
        self._given: tuple[Any, Any] | None = None
        self.calibration = calibration
        if self._loss_fn is not None:
            self.calibration = dataclasses.replace(calibration, loss_fn=self._loss)

    def _loss(self, output: Any, target: Any) -> Tensor:
        assert self._loss_fn is not None
        self._given = output, target
        return self._loss_fn(output, target)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") != "__get__":  # of shapes and dtypes
            self.uses.update(id(t) for t in _flat(args) if id(t) in self._weights)
            self.uses.update(
                id(t) for t in _flat((kwargs or {}).values()) if id(t) in self._weights
            )
        return func(*args, **(kwargs or {}))

    def loss_is_mean(self, size: int) -> bool | None:
        """Whether the loss is the mean of those of single examples; None if that cannot be told."""
        if self._loss_fn is None or self._given is None:
            return None
        output, target = self._given
        leaves, form = tree_flatten(output)
        places = [i for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.requires_grad]
        if not places or any(not leaves[i].dim() or len(leaves[i]) != size for i in places):
            return None
        loss_fn = self._loss_fn
        leaves = [t.detach() if isinstance(t, Tensor) else t for t in leaves]

        def together(parts: list[Any]) -> Tensor:
            return loss_fn(tree_unflatten(parts, form), target)

        def apart(parts: list[Any]) -> Tensor:
            losses = [
                loss_fn(tree_unflatten(example(parts, i, size), form), example(target, i, size))
                for i in range(size)
            ]
            return torch.stack([loss.reshape(()) for loss in losses]).sum()

        whole, each = (_gradients(loss, leaves, places) for loss in (together, apart))
        pairs = zip(whole, each, strict=True)
        return all(_same_rows(a * size, b) for a, b in pairs if a is not None and b is not None)


def _gradients(
    loss_of: Callable[[list[Any]], Tensor], leaves: list[Any], places: Sequence[int]
) -> Sequence[Tensor | None]:
    """Of a loss, by those of its arguments at some places."""
    parts = list(leaves)
    with torch.enable_grad():
        for i in places:
            parts[i] = leaves[i].detach().requires_grad_()
        loss = loss_of(parts)
        if not loss.requires_grad:
            return [None] * len(places)
        return torch.autograd.grad(loss, [parts[i] for i in places], allow_unused=True)


def _same_rows(a: Tensor, b: Tensor) -> bool:
    """Whether the parts of all examples are the same but for rounding."""
    close = 5e-2 if a.element_size() < 4 else 1e-3
    off, size = ((t.double().flatten(1).norm(dim=1)) for t in (a - b, b))
    return bool((off <= close * size + 1e-30).all())


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple | list):
            yield from _flat(value)
        else:
            yield value
