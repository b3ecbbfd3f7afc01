"""Normalization statistics, estimated anew for a model whose weights have changed."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence

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
    Mean and variance are those over all batches, and all data-parallel ranks. The idea is that of
    "precise" BatchNorm (Y. Wu and J. Johnson, "Rethinking 'batch' in BatchNorm", 2021,
    https://arxiv.org/abs/2105.07576, section 3.1); here it mends what pruning has shifted.

    Raises ValueError for empty data; the statistics are then as before.
    """
    norms = _norms(model)
    if not norms:
        log.info("no BatchNorm statistics to estimate anew")
        return
    momenta = [norm.momentum for norm in norms]
    with put_back(model), undisturbed(model, calibration), torch.no_grad():
        counts = [norm.num_batches_tracked.clone() for norm in norms]  # type: ignore[union-attr]
        try:
            for norm in norms:
                norm.train()
                norm.momentum = 1.0  # so that the buffers hold the last batch's
            means, variances = _moments(model, norms, calibration)
        finally:
            for norm, momentum, count in zip(norms, momenta, counts, strict=True):
                norm.momentum = momentum
                norm.num_batches_tracked.copy_(count)  # type: ignore[union-attr]
        for norm, mean, variance in zip(norms, means, variances, strict=True):
            norm.running_mean.copy_(mean)  # type: ignore[union-attr]
            norm.running_var.copy_(variance)  # type: ignore[union-attr]


def _moments(
    model: nn.Module, norms: Sequence[_BatchNorm], calibration: Calibration
) -> tuple[list[Tensor], list[Tensor]]:
    """Mean and variance of each norm's inputs over all batches: the law of total variance."""
    sums = [torch.zeros(2, norm.num_features, dtype=torch.float64) for norm in norms]
    count = torch.zeros(1, dtype=torch.float64)
    with all_ranks().raise_on_all_ranks():
        for batch in track(in_common(model, calibration), "normalization statistics"):
            calibration.run(model, batch)
            count += 1
            for total, norm in zip(sums, norms, strict=True):
                mean, var = norm.running_mean.double(), norm.running_var.double()  # type: ignore[union-attr]
                total += torch.stack([mean, var + mean.square()]).cpu()
    count = all_ranks().all_reduce(count)
    if count == 0:
        raise ValueError("the calibration data is empty; nothing was pruned")
    moments = [all_ranks().all_reduce(total) / count for total in sums]
    return [m[0] for m in moments], [m[1] - m[0].square() for m in moments]
