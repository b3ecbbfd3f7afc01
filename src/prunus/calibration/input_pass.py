"""The forward passes that fill statistics of layers' inputs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunus.calibration.calibration import Calibration, in_common, undisturbed
from prunus.calibration.padding import Padding
from prunus.core.layers import Layer
from prunus.core.progress import track
from prunus.core.ranks import all_ranks
from prunus.stats import Statistic


class _InputsDiverged(Exception):  # noqa: N818
    """Layers that had the same input at first have different ones now."""


class _Inputs:
    """Feeds the layers' inputs to their statistics; layers with the same input share one.

    Those are layers called one after the other with one and the same tensor, not written to in
    between, as projections to queries, keys and values are. `take` and `check` raise
    _InputsDiverged if that turns out not to be always so.
    """

    def __init__(self, stats: Mapping[Layer, Statistic], share: bool, padding: Padding) -> None:
        self.stats, self.share, self.padding = stats, share, padding
        self.leaders: dict[Layer, Layer] = {}
        self.last: tuple[Layer, Tensor, int] | None = None
        self.calls = dict.fromkeys(stats, 0)

    def take(self, layer: Layer, x: Tensor) -> None:
        real = self.padding.real(layer, x)
        if self.padding.watching:
            return
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
            self.stats[layer].update(layer.input_matrix(x if real is None else x[real]))

    def check(self) -> None:
        """At the end: each layer was called as often as the one with which it shares."""
        if any(self.calls[layer] != self.calls[first] for layer, first in self.leaders.items()):
            raise _InputsDiverged


def _see_alike(a: Layer, b: Layer) -> bool:
    """Whether two layers turn one input into the same matrix."""
    keys = ("kernel_size", "stride", "padding", "dilation", "groups")
    return a.channels_inner == b.channels_inner and all(
        getattr(a.module, key, None) == getattr(b.module, key, None) for key in keys
    )


def measure_inputs(
    model: nn.Module, stats: Mapping[Layer, Statistic], calibration: Calibration
) -> dict[Layer, Statistic]:
    """Fill the statistics from the layers' inputs, in one pass over the calibration data.

    Padding (zeros in a batch's ``attention_mask``) is left out where an input's rows are the tokens
    of that mask. Returns the statistic of each layer, which is one and the same for layers that
    have the same input; those must not be used beside it. Raises ValueError for empty data, and for
    a layer that no batch has reached.
    """
    shared: dict[Layer, Statistic] = {}
    inputs = _Inputs(stats, share=True, padding=Padding(model, calibration.told))
    with all_ranks().raise_on_all_ranks(), contextlib.suppress(_InputsDiverged):
        shared = _pass(model, inputs, calibration)
    if _on_all_ranks(inputs.leaders if shared else {}, stats) and shared:
        return shared
    for stat in stats.values():
        for t in stat.tensors():
            t.zero_()
    return _pass(
        model, _Inputs(stats, share=False, padding=Padding(model, calibration.told)), calibration
    )


def _on_all_ranks(leaders: Mapping[Layer, Layer], stats: Mapping[Layer, Statistic]) -> bool:
    """Whether the same layers share on all ranks, where routing may depend on the data."""
    places = {layer: i for i, layer in enumerate(stats)}
    places_here = torch.tensor([places[leaders[x]] if x in leaders else -1 for x in stats])
    total, squares = all_ranks().all_reduce(torch.stack([places_here, places_here.square()]))
    return bool((squares * all_ranks().world_size == total.square()).all())


def _pass(model: nn.Module, inputs: _Inputs, calibration: Calibration) -> dict[Layer, Statistic]:
    def hook(layer: Layer) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        return lambda module, args, kwargs: inputs.take(layer, (*args, *kwargs.values())[0])

    count, run = 0, functools.partial(calibration.run, model)
    with contextlib.ExitStack() as stack, undisturbed(model, calibration), torch.no_grad():
        for layer in inputs.stats:
            handle = layer.module.register_forward_pre_hook(hook(layer), with_kwargs=True)
            stack.callback(handle.remove)
        for batch in track(in_common(model, calibration), "calibration"):
            inputs.padding.begin(batch, run)
            inputs.last = None
            run(batch)
            count += 1
    inputs.padding.tell()
    inputs.check()
    if count == 0:
        raise ValueError("the calibration data is empty; nothing was pruned")
    if missed := [layer.name for layer in inputs.stats if layer not in inputs.leaders]:
        raise ValueError(
            f"no calibration batch reached {', '.join(missed[:5])}; nothing was pruned"
        )
    return {layer: inputs.stats[leader] for layer, leader in inputs.leaders.items()}
