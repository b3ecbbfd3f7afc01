"""SparseML's ``grad_sampler``, the data for second-order pruners, as a `Calibration`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from prunus.calibration.batches import to_device
from prunus.calibration.calibration import Calibration

LOSSES = ("loss_function", "loss_fn")
"""SparseML's spelling and CAP's"""


@dataclass(frozen=True)
class Loader:
    """Builds a new loader for every pass.

    SparseML calls ``data_loader_builder(kwargs)``, CAP ``data_loader_builder(**kwargs)``.
    """

    builder: Callable[..., Any]
    kwargs: Mapping[str, Any]
    unpack: bool

    def __iter__(self) -> Iterator[Any]:
        settings = dict(self.kwargs)
        loader = self.builder(**settings) if self.unpack else self.builder(settings)
        return iter(loader() if callable(loader) else loader)


def calibration_of(
    sampler: Mapping[str, Any] | Calibration | None,
    kwargs: Mapping[str, Any],
    num_batches: int | None,
) -> Calibration | None:
    """The calibration data that a ``grad_sampler`` stands for.

    Its ``data_loader_builder`` makes iterables, endless ones too, of ``(args, kwargs, target)``:
    the loss is ``loss(model(*args, **kwargs), target)``, with the first output of several.
    Raises ValueError if a part of it is missing.
    """
    if sampler is None or isinstance(sampler, Calibration):
        return sampler
    loss_key = next((key for key in LOSSES if key in sampler), None)
    if loss_key is None or "data_loader_builder" not in sampler:
        raise ValueError(
            f"grad_sampler has {sorted(sampler)}; it needs 'data_loader_builder', and "
            "'loss_function' or 'loss_fn'"
        )
    loss: Callable[[Any, Any], Tensor] = sampler[loss_key]

    def forward(model: nn.Module, batch: Any) -> Tensor:
        args, keywords, target = to_device(batch, next(model.parameters()).device)
        output = model(*args, **keywords)
        return loss(output[0] if type(output) is tuple else output, target)

    loader = Loader(sampler["data_loader_builder"], kwargs, unpack=loss_key == "loss_fn")
    return Calibration(loader, forward=forward, num_batches=num_batches)
