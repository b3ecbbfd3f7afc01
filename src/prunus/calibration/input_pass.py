"""The forward passes that fill statistics of layers' inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunus.calibration.calibration import Calibration, in_common, undisturbed
from prunus.core.layers import Layer, unwrap
from prunus.core.progress import track
from prunus.core.ranks import all_ranks
from prunus.stats import Statistic, take_in

NO_INPUTS = "no calibration batch reached"


class _InputsDiverged(Exception):  # noqa: N818
    """Layers that had the same input at first have different ones now."""


def real_tokens(batch: Any, model: nn.Module) -> Tensor | None:
    """(examples, tokens) which tokens are no padding, if a batch says so and has any padding.

    Not for encoder-decoder models, whose mask is of the encoder's tokens only.
    """
    if getattr(getattr(unwrap(model), "config", None), "is_encoder_decoder", False):
        return None
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask.all()):
        return None
    return mask.bool()


class _Inputs:
    """Feeds the layers' inputs to their statistics; layers with the same input share one.

    Those are layers called one after the other with one and the same tensor, not written to in
    between, as projections to queries, keys and values are. `take` and `check` raise
    _InputsDiverged if that turns out not to be always so.
    """

    def __init__(self, stats: Mapping[Layer, Statistic], share: bool) -> None:
        self.stats, self.share = stats, share
        self.leaders: dict[Layer, Layer] = {}
        self.real: Tensor | None = None
        self.last: tuple[Layer, Tensor, int] | None = None
        self.calls = dict.fromkeys(stats, 0)
        self.rows = dict.fromkeys(stats, 0)
        """samples that the statistic of each layer has taken in"""

    def take(self, layer: Layer, x: Tensor) -> None:
        first = layer not in self.leaders
        features = getattr(x, "features", x)  # of a sparse tensor
        version = 0 if features.is_inference() else features._version
        leader = layer
        if self.last is not None and self.last[1] is x and self.last[2] == version:
            leader = self.leaders[self.last[0]] if _see_alike(self.last[0], layer) else layer
        if first:
            self.leaders[layer] = leader if self.share else layer
        elif self.leaders[layer] is not layer and self.leaders[layer] is not leader:
            raise _InputsDiverged
        self.last = layer, x, version
        self.calls[layer] += 1
        if self.leaders[layer] is layer:
            samples = layer.input_matrix(self._without_padding(x))
            self.rows[layer] += len(samples)
            if len(samples):
                take_in(self.stats[layer], samples, layer.name)

    def check(self) -> None:
        """At the end: each layer was called as often as the one with which it shares."""
        if any(self.calls[layer] != self.calls[first] for layer, first in self.leaders.items()):
            raise _InputsDiverged

    def _without_padding(self, x: Tensor) -> Tensor:
        real = self.real
        if real is None:
            return x
        if x.dim() > 2 and x.shape[:2] == real.shape:
            return x[real.to(x.device)]
        if x.dim() == 2 and len(x) == real.numel():
            return x[real.flatten().to(x.device)]
        return x


def _see_alike(a: Layer, b: Layer) -> bool:
    """Whether two layers turn one input into the same matrix."""
    keys = ("kernel_size", "stride", "padding", "dilation", "groups")
    return a.channels_inner == b.channels_inner and all(
        getattr(a.module, key, None) == getattr(b.module, key, None) for key in keys
    )


def measure_inputs(
    model: nn.Module, stats: Mapping[Layer, Statistic], calibration: Calibration
) -> tuple[dict[Layer, Statistic], set[Layer]]:
    """Fill the statistics from the layers' inputs, in one pass over the calibration data.

    Padding (zeros in a batch's ``attention_mask``) is left out. Returns the statistic of each
    layer, which is one and the same for layers that have the same input; those must not be used
    beside it. And the layers that no sample has reached on any rank: not called, or with nothing,
    as experts are that no token is sent to. Raises ValueError for empty data.
    """
    inputs, passed = _Inputs(stats, share=True), False
    with all_ranks().raise_on_all_ranks(), contextlib.suppress(_InputsDiverged):
        _pass(model, inputs, calibration)
        passed = True
    if not _on_all_ranks(inputs.leaders, stats, passed):
        for stat in stats.values():
            for t in stat.tensors():
                t.zero_()
        inputs = _Inputs(stats, share=False)
        with all_ranks().raise_on_all_ranks():
            _pass(model, inputs, calibration)
    leaders = [inputs.leaders.get(layer, layer) for layer in stats]
    rows = all_ranks().all_reduce(torch.tensor([inputs.rows[x] for x in leaders])).tolist()
    unreached = {layer for layer, count in zip(stats, rows, strict=True) if count == 0}
    return {x: stats[leader] for x, leader in zip(stats, leaders, strict=True)}, unreached


def _on_all_ranks(
    leaders: Mapping[Layer, Layer], stats: Mapping[Layer, Statistic], passed: bool
) -> bool:
    """Whether the same layers share on all ranks, where routing may depend on the data."""
    places = {layer: i for i, layer in enumerate(stats)}
    here = [places[leaders[x]] if x in leaders else -1 for x in stats]
    places_here = torch.tensor([*here, 0 if passed else 1])
    total, squares = all_ranks().all_reduce(torch.stack([places_here, places_here.square()]))
    return bool((squares * all_ranks().world_size == total.square()).all()) and int(total[-1]) == 0


def _pass(model: nn.Module, inputs: _Inputs, calibration: Calibration) -> None:
    def hook(layer: Layer) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        return lambda module, args, kwargs: inputs.take(layer, (*args, *kwargs.values())[0])

    count = 0
    with contextlib.ExitStack() as stack, undisturbed(model, calibration), torch.no_grad():
        for layer in inputs.stats:
            handle = layer.module.register_forward_pre_hook(hook(layer), with_kwargs=True)
            stack.callback(handle.remove)
        for batch in track(in_common(model, calibration), "calibration"):
            inputs.real, inputs.last = real_tokens(batch, model), None
            calibration.run(model, batch)
            count += 1
    inputs.check()
    if count == 0:
        raise ValueError("the calibration data is empty; nothing was pruned")
