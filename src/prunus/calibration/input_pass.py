"""The forward passes that fill statistics of layers' inputs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunus.calibration.calibration import Calibration, in_common, undisturbed
from prunus.calibration.padding import Padding
from prunus.calibration.products import products
from prunus.core.layers import Layer
from prunus.core.progress import track
from prunus.core.ranks import all_ranks
from prunus.stats import Statistic, take_in

NO_INPUTS = "no calibration batch reached"


class _InputsDiverged(Exception):  # noqa: N818
    """Layers that had the same input at first have different ones now."""


class _Inputs:
    """Feeds the layers' inputs to their statistics; layers with the same input share one.

    Those are layers called one after the other with one and the same tensor, not written to in
    between, as projections to queries, keys and values are. `add` and `check` raise
    _InputsDiverged if that turns out not to be always so.
    """

    def __init__(self, stats: Mapping[Layer, Statistic], share: bool, padding: Padding) -> None:
        self.stats, self.share, self.padding = stats, share, padding
        self.leaders: dict[Layer, Layer] = {}
        self.last: tuple[Layer, Tensor, int] | None = None
        self.calls = dict.fromkeys(stats, 0)
        self.rows = dict.fromkeys(stats, 0)
        """samples that the statistic of each layer has taken in"""

    def add(self, layer: Layer, x: Tensor, read: Callable[[Tensor], Tensor] | None = None) -> None:
        """One call of the layer; ``read`` turns the input into (samples, columns)."""
        read = read or (lambda matrix: matrix)
        real = self.padding.real(layer, x)
        if self.padding.watching:
            return
        first = layer not in self.leaders
        features = getattr(x, "features", x)  # of a sparse tensor
        version = 0 if features.is_inference() else features._version
        leader = layer
        if self.last is not None and _same(self.last[1], x) and self.last[2] == version:
            leader = self.leaders[self.last[0]] if _see_alike(self.last[0], layer) else layer
        if first:
            self.leaders[layer] = leader if self.share else layer
        elif self.leaders[layer] is not layer and self.leaders[layer] is not leader:
            raise _InputsDiverged
        self.last = layer, x, version
        self.calls[layer] += 1
        if self.leaders[layer] is layer:
            samples = read(x if real is None else x[real])
            self.rows[layer] += len(samples)
            if len(samples):
                take_in(self.stats[layer], samples, layer.name)

    def check(self) -> None:
        """At the end: each layer was called as often as the one with which it shares."""
        if any(self.calls[layer] != self.calls[first] for layer, first in self.leaders.items()):
            raise _InputsDiverged


def _same(a: Any, b: Any) -> bool:
    """Whether two inputs are one tensor, or views of the same memory."""
    if a is b or not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return a is b
    if a.layout != torch.strided or b.layout != torch.strided or not a.numel():
        return False
    return (a.data_ptr(), a.shape, a.stride()) == (b.data_ptr(), b.shape, b.stride())


def _see_alike(a: Layer, b: Layer) -> bool:
    """Whether two layers turn one input into the same matrix."""
    keys = ("kernel_size", "stride", "padding", "dilation", "groups")
    groups = [x.piece for x in (a, b) if x.piece is not None and x.piece.kind == "group"]
    same_group = not groups or a.part_key == b.part_key
    return (
        same_group
        and a.channels_inner == b.channels_inner
        and all(getattr(a.module, key, None) == getattr(b.module, key, None) for key in keys)
    )


def measure_inputs(
    model: nn.Module, stats: Mapping[Layer, Statistic], calibration: Calibration
) -> tuple[dict[Layer, Statistic], set[Layer]]:
    """Fill the statistics from the layers' inputs, in one pass over the calibration data.

    Padding (zeros in a batch's ``attention_mask``) is left out where an input's rows are the tokens
    of that mask. Returns the statistic of each layer, which is one and the same for layers that
    have the same input; those must not be used beside it. And the layers that no sample has
    reached on any rank: not called, or with nothing, as experts are that no token is sent to.
    Raises ValueError for empty data.
    """
    for layer in stats:
        if message := layer.no_inputs():
            raise ValueError(f"{message}; exclude it, or use a pruner that needs no inputs")
    inputs = _Inputs(stats, share=True, padding=Padding(model, calibration.told))
    passed = _pass(model, inputs, calibration)
    if not _on_all_ranks(inputs.leaders, stats, passed):
        for stat in stats.values():
            for t in stat.tensors():
                t.zero_()
        inputs = _Inputs(stats, share=False, padding=Padding(model, calibration.told))
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


def _pass(model: nn.Module, inputs: _Inputs, calibration: Calibration) -> bool:
    """Feed the inputs of all batches; whether layers share as the first calls said.

    All ranks make the same passes. Raises ValueError for empty data.
    """
    by_call = [layer for layer in inputs.stats if layer.reads_arguments]
    by_product = [layer for layer in inputs.stats if not layer.reads_arguments]
    passed = _run(model, inputs, calibration, by_call, by_product)
    missed = [passed and layer not in inputs.leaders for layer in by_call]
    totals = all_ranks().all_reduce(torch.tensor(missed, dtype=torch.int64))
    if not bool((totals == all_ranks().world_size).any()):
        return passed
    # weights that are used without calling their module
    uncalled = [layer for layer, miss in zip(by_call, missed, strict=True) if miss]
    inputs.padding = Padding(model, calibration.told)
    return _run(model, inputs, calibration, [], uncalled) and passed


def _run(
    model: nn.Module,
    inputs: _Inputs,
    calibration: Calibration,
    by_call: Sequence[Layer],
    by_product: Sequence[Layer],
) -> bool:
    """One pass over the data in which these layers are watched; False if they do not share."""
    passed = False
    with all_ranks().raise_on_all_ranks(), contextlib.suppress(_InputsDiverged):
        _feed(model, inputs, calibration, by_call, by_product)
        inputs.check()
        passed = True
    return passed


def _feed(
    model: nn.Module,
    inputs: _Inputs,
    calibration: Calibration,
    by_call: Sequence[Layer],
    by_product: Sequence[Layer],
) -> None:
    def hook(layer: Layer) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        return lambda module, args, kwargs: inputs.add(
            layer, (*args, *kwargs.values())[0], layer.input_matrix
        )

    count, run = 0, functools.partial(calibration.run, model)
    with contextlib.ExitStack() as stack, undisturbed(model, calibration), torch.no_grad():
        for layer in by_call:
            handle = layer.module.register_forward_pre_hook(hook(layer), with_kwargs=True)
            stack.callback(handle.remove)
        forget = stack.enter_context(products(by_product, inputs.add))
        for batch in track(in_common(model, calibration), "calibration"):
            inputs.padding.begin(batch, run)
            forget()
            inputs.last = None
            run(batch)
            forget()
            count += 1
    inputs.padding.tell()
    if count == 0:
        raise ValueError("the calibration data is empty; nothing was pruned")
