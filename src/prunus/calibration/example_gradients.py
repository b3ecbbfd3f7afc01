"""Gradient samples of a model's weights, taken without disturbing its training."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from prunus.calibration.batches import Batch
from prunus.calibration.calibration import Calibration
from prunus.calibration.example_checks import Watch, example, size_of, telling
from prunus.core.layers import Layer
from prunus.core.masks import local
from prunus.core.ranks import no_error_sync
from prunus.core.sharding import any_sharded
from prunus.core.wrappers import unwrap

log = logging.getLogger("prunus")

Grads = list["Tensor | None"]
"""For each layer (samples, rows, cols); None if the loss does not depend on it."""


@contextlib.contextmanager
def gradients_on(model: nn.Module, layers: Sequence[Layer]) -> Iterator[None]:
    """Gradients for the layers' weights, frozen ones too; everybody's ``.grad`` is put back."""
    before = [(p, p.grad) for p in model.parameters()]
    frozen = [layer.weight for layer in layers if not layer.weight.requires_grad]
    try:
        with torch.inference_mode(False), torch.enable_grad():
            for weight in frozen:
                weight.requires_grad_(True)
            for p, _ in before:
                p.grad = None
            yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
        for p, grad in before:
            p.grad = grad


def micro_batch_gradients(
    model: nn.Module, layers: Sequence[Layer], calibration: Calibration, batch: Batch
) -> Grads:
    """One sample for each layer: the gradient of the mean loss of a batch.

    Of FSDP2's sharded weights, this rank's rows of the mean over the ranks' batches.
    """
    loss = calibration.loss(unwrap(model), batch)
    weights = [layer.weight for layer in layers]
    found: Sequence[Tensor | None]
    with torch.autocast(loss.device.type, enabled=False):  # a backward pass runs outside of it
        if any_sharded(layers):  # FSDP2 gathers and reduces in a backward pass only
            with no_error_sync():
                loss.backward()  # type: ignore[no-untyped-call]
            found = [w.grad for w in weights]
            for p in model.parameters():
                p.grad = None
        else:
            found = _gradients(loss, weights)
    return [
        None if g is None else layer.matrix(layer.part(local(g.detach()))).unsqueeze(0)
        for layer, g in zip(layers, found, strict=True)
    ]


def _gradients(loss: Tensor, weights: Sequence[Tensor]) -> list[Tensor | None]:
    """Of weights that may repeat, as those of experts do."""
    each = {id(w): w for w in weights}
    grads = torch.autograd.grad(loss, list(each.values()), allow_unused=True)
    found = dict(zip(each, grads, strict=True))
    return [found[id(w)] for w in weights]


class _Tap(torch.autograd.Function):
    """Identity that shows the gradient of an output to `sink`; `probe` asks for the backward."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, probe: Tensor, sink: Callable[[Tensor], None]) -> Tensor:
        ctx.sink = sink
        return output.clone()  # a view could not be modified in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        ctx.sink(grad)
        return grad, torch.zeros((), device=grad.device), None


Seen = list[list[tuple[Tensor, Tensor]]]


class ExampleGradients:
    """Gradients of single examples from one backward pass over a batch.

    The gradient of a linear layer is, for each example, the product of its inputs and the gradients
    of its outputs, both of which a hook sees (I. Goodfellow, "Efficient per-example gradient
    computations", 2015, https://arxiv.org/abs/1510.01799); convolutions likewise, with their inputs
    unfolded. Not so where a weight is used outside its module, where the loss is no mean over
    examples, such as that of texts of unequal lengths, or where a layer has no such form: from the
    first batch on that shows it, each example has its own pass.

    Some examples of the first batch are compared with passes of their own. In later batches uses of
    the weights are counted, and the loss function is asked again for each example (`Watch`); if
    that does not tell, as where the loss is the model's own, passes are compared again.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[Layer], calibration: Calibration, at_once: int
    ) -> None:
        self.model, self.layers, self.calibration = unwrap(model), layers, calibration
        self.at_once = at_once
        reasons = [x.name for x in layers if not x.reads_arguments or x.no_inputs()]
        self.by_hooks: bool | None = False if reasons else None
        if reasons:
            log.info("one backward pass for each example, because %s is no plain layer", reasons[0])

    def __call__(self, batch: Batch) -> Iterator[Grads]:
        """(samples, rows, cols) for each layer, at most `at_once` samples at a time."""
        size = size_of(batch)
        seen = None
        if self.by_hooks is not False:
            watch = Watch(self.calibration, [layer.weight for layer in self.layers])
            seen = self._seen(batch, watch)
            agrees = self._agrees(batch, seen, watch, size)
            self.by_hooks = self.by_hooks if agrees is None else agrees
        if seen is None or not self.by_hooks:
            singles = (self._single(batch, i, size) for i in range(size))
            while some := list(islice(singles, self.at_once)):
                yield [_stack(samples) for samples in zip(*some, strict=True)]
            return
        for begin in range(0, size, self.at_once):
            end = min(begin + self.at_once, size)
            yield [self._product(i, seen[i], begin, end, size) for i in range(len(self.layers))]

    def _single(self, batch: Batch, i: int, size: int) -> Grads:
        one = example(batch, i, size)
        return micro_batch_gradients(self.model, self.layers, self.calibration, one)

    def _agrees(self, batch: Batch, seen: Seen, watch: Watch, size: int) -> bool | None:
        """Whether hooks give what passes of their own do; None if this batch does not tell."""
        calls = zip(self.layers, seen, strict=True)
        inside = all(watch.uses[id(layer.weight)] == len(each) for layer, each in calls)
        mean = watch.loss_is_mean(size)
        if mean is False:
            log.warning(
                "one backward pass for each example, because the loss is no mean over examples"
            )
            return False
        if self.by_hooks and inside and mean:
            return True
        return self._agrees_with_passes(batch, seen, size)

    def _agrees_with_passes(self, batch: Batch, seen: Seen, size: int) -> bool | None:
        told = [False] * len(self.layers)
        for at in telling(batch, size):
            fast_gradients = [
                self._product(i, seen[i], at, at + 1, size) for i in range(len(self.layers))
            ]
            slow_gradients = self._single(batch, at, size)
            for i, (fast, slow) in enumerate(zip(fast_gradients, slow_gradients, strict=True)):
                same = _alike(fast, slow)
                told[i] |= same is not None
                if same is False:
                    log.warning(
                        "one backward pass for each example, because %s gives other gradients "
                        "alone than in a batch: it is used outside its module, or the loss is no "
                        "mean over examples",
                        self.layers[i].name,
                    )
                    return False
        return True if all(told) else None

    def _seen(self, batch: Batch, watch: Watch) -> Seen:
        """For each layer its calls: inputs and the gradients of outputs."""
        seen: Seen = [[] for _ in self.layers]
        probe = torch.zeros((), device=self.layers[0].local.device, requires_grad=True)

        def hook(calls: list[tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
            def tap(
                module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
            ) -> Tensor:
                x = (*args, *kwargs.values())[0].detach()
                tapped: Tensor = _Tap.apply(output, probe, lambda grad: calls.append((x, grad)))
                return tapped

            return tap

        with contextlib.ExitStack() as stack:
            for layer, calls in zip(self.layers, seen, strict=True):
                handle = layer.module.register_forward_hook(hook(calls), with_kwargs=True)
                stack.callback(handle.remove)
            stack.enter_context(watch)
            loss = watch.calibration.loss(self.model, batch)
        if loss.requires_grad:
            with torch.autocast(loss.device.type, enabled=False):
                torch.autograd.grad(loss, [probe], allow_unused=True)
        return seen

    def _product(
        self, i: int, calls: Sequence[tuple[Tensor, Tensor]], begin: int, end: int, size: int
    ) -> Tensor | None:
        layer, total = self.layers[i], None
        for x, grad in calls:
            if len(x) % size or len(grad) % size:
                return None  # not the batch first: `_agrees` finds out
            each, rest = len(x) // size, len(grad) // size
            inputs = layer.input_matrix(x[begin * each : end * each])
            outputs = layer.output_matrix(grad[begin * rest : end * rest])
            a = inputs.reshape(end - begin, -1, inputs.shape[1])
            g = outputs.reshape(end - begin, -1, outputs.shape[1])
            with torch.autocast(g.device.type, enabled=False):
                product = torch.bmm(g.mT * size, a.to(g.dtype))
            total = product if total is None else total + product
        return total


def _alike(fast: Tensor | None, slow: Tensor | None) -> bool | None:
    """Whether two gradients are the same but for rounding; None if that cannot be seen."""
    if fast is None and slow is None:
        return None
    known = fast if slow is None else slow
    assert known is not None
    a, b = (torch.zeros_like(known) if t is None else t.float() for t in (fast, slow))
    size = float(b.norm())
    if not math.isfinite(size) or (size == 0 and float(a.norm()) == 0):
        return None
    return float((a - b).norm()) <= 0.05 * size


def _stack(samples: Sequence[Tensor | None]) -> Tensor | None:
    shapes = [sample for sample in samples if sample is not None]
    if not shapes:
        return None
    return torch.cat([torch.zeros_like(shapes[0]) if s is None else s for s in samples])
