"""Normalization statistics, estimated anew for a model whose weights have changed."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunus.calibration.calibration import Calibration, in_common, undisturbed
from prunus.core.progress import track
from prunus.core.ranks import all_ranks

log = logging.getLogger("prunus")


def _norms(model: nn.Module) -> list[_BatchNorm]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


@contextlib.contextmanager
def put_back(model: nn.Module, always: bool = False) -> Iterator[None]:
    """The running statistics as they were if an error comes through, or `always`."""
    saved = [(b, b.clone()) for norm in _norms(model) for b in norm.buffers()]
    done = False
    try:
        yield
        done = True
    finally:
        if always or not done:
            for buffer, old in saved:
                buffer.copy_(old)


def recalibrate(model: nn.Module, calibration: Calibration) -> None:
    """Set the running mean and variance of every BatchNorm to those of the calibration data.

    Each batch is normalized by its own statistics on the way, so let it have some tens of examples.
    Mean and (unbiased) variance are those over all inputs of all batches and data-parallel ranks,
    whatever the sizes of the batches. The idea is that of
    "precise" BatchNorm (Y. Wu and J. Johnson, "Rethinking 'batch' in BatchNorm", 2021,
    https://arxiv.org/abs/2105.07576, section 3.1); here it mends what pruning has shifted.

    Raises ValueError for empty data; the statistics are then as before.
    """
    norms = _norms(model)
    if not norms:
        log.info("no BatchNorm statistics to estimate anew")
        return
    if any(b.is_inference() for norm in norms for b in norm.buffers()):
        raise ValueError(
            "the BatchNorm statistics were made inside torch.inference_mode, so nothing may write "
            "to them; make or load the model outside of that"
        )
    momenta = [norm.momentum for norm in norms]
    with put_back(model), undisturbed(model, calibration), torch.no_grad():
        before = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]  # type: ignore[union-attr]
        counts = [norm.num_batches_tracked.clone() for norm in norms]  # type: ignore[union-attr]
        try:
            for norm in norms:
                norm.train()
                norm.momentum = 1.0  # so that the buffers hold the last batch's
            moments = _moments(model, norms, calibration)
        finally:
            for norm, momentum, count in zip(norms, momenta, counts, strict=True):
                norm.momentum = momentum
                norm.num_batches_tracked.copy_(count)  # type: ignore[union-attr]
        for norm, (seen, mean, variance), old in zip(norms, moments, before, strict=True):
            known = bool(seen.amax() > 0)  # what no batch reached keeps what it had
            norm.running_mean.copy_(mean if known else old[0])  # type: ignore[union-attr]
            # a single value tells nothing of a variance
            norm.running_var.copy_(variance if seen.amax() > 1 else old[1])  # type: ignore[union-attr]


class _Moments:
    """Count, mean and mean square of one norm's inputs, summed over its calls; in float64."""

    def __init__(self, norm: _BatchNorm) -> None:
        self.sums = torch.zeros(3, norm.num_features, dtype=torch.float64)

    def __call__(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before each call of the norm, whose input has its channels along axis 1."""
        x = (args[0] if args else kwargs["input"]).detach().movedim(1, 0).flatten(1)
        count = x.shape[1]
        # a single value has no variance to be normalized by; that of the batch before stands in
        norm.train(count != 1 or (isinstance(norm, nn.SyncBatchNorm) and _is_distributed()))
        if count:
            var, mean = torch.var_mean(x.to(_promoted(x.dtype)), 1, correction=0)
            mean, var = mean.cpu().double(), var.cpu().double()
            self.sums += count * torch.stack([torch.ones_like(mean), mean, var + mean.square()])


def _is_distributed() -> bool:
    return all_ranks().group is not None


def _promoted(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _moments(
    model: nn.Module, norms: Sequence[_BatchNorm], calibration: Calibration
) -> list[Tensor]:
    """(3, channels) for each norm: count, mean and unbiased variance over all its inputs."""
    taps = [_Moments(norm) for norm in norms]
    count = torch.zeros(1, dtype=torch.float64)
    with contextlib.ExitStack() as stack:
        for norm, tap in zip(norms, taps, strict=True):
            stack.callback(norm.register_forward_pre_hook(tap, with_kwargs=True).remove)
        stack.enter_context(all_ranks().raise_on_all_ranks())
        for batch in track(in_common(model, calibration), "normalization statistics"):
            calibration.run(model, batch)
            count += 1
    if all_ranks().all_reduce(count) == 0:
        raise ValueError("the calibration data is empty; nothing was pruned")
    return [_unbiased(all_ranks().all_reduce(tap.sums)) for tap in taps]


def _unbiased(sums: Tensor) -> Tensor:
    """By the law of total variance, as if all inputs were one batch."""
    count = sums[0].clamp(min=1)
    mean = sums[1] / count
    var = (sums[2] / count - mean.square()).clamp(min=0) * count / (count - 1).clamp(min=1)
    return torch.stack([sums[0], mean, var])
