"""The forward passes that fill statistics of layers' inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunus.calibration.calibration import Calibration, in_common, undisturbed
from prunus.calibration.products import products
from prunus.core.layers import Layer, unwrap
from prunus.core.progress import track
from prunus.core.ranks import all_ranks
from prunus.stats import Statistic


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
    between, as projections to queries, keys and values are. `add` and `check` raise
    _InputsDiverged if that turns out not to be always so.
    """

    def __init__(self, stats: Mapping[Layer, Statistic], share: bool) -> None:
        self.stats, self.share = stats, share
        self.leaders: dict[Layer, Layer] = {}
        self.real: Tensor | None = None
        self.last: tuple[Layer, Tensor, int] | None = None
        self.calls = dict.fromkeys(stats, 0)

    def add(self, layer: Layer, x: Tensor, read: Callable[[Tensor], Tensor] | None = None) -> None:
        """One call of the layer; ``read`` turns the input into (samples, columns)."""
        read = read or (lambda matrix: matrix)
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
            self.stats[layer].update(read(self._without_padding(x)))

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


def _same(a: Any, b: Any) -> bool:
    """Whether two inputs are one tensor, or views of the same memory."""
    if a is b or not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return a is b
    if a.layout != torch.strided or b.layout != torch.strided:
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
) -> dict[Layer, Statistic]:
    """Fill the statistics from the layers' inputs, in one pass over the calibration data.

    Padding (zeros in a batch's ``attention_mask``) is left out. Returns the statistic of each
    layer, which is one and the same for layers that have the same input; those must not be used
    beside it. Raises ValueError for empty data, and for a layer that no batch has reached.
    """
    for layer in stats:
        if message := layer.no_inputs():
            raise ValueError(f"{message}; exclude it, or use a pruner that needs no inputs")
    shared: dict[Layer, Statistic] = {}
    inputs = _Inputs(stats, share=True)
    with all_ranks().raise_on_all_ranks(), contextlib.suppress(_InputsDiverged):
        shared = _pass(model, inputs, calibration)
    if _on_all_ranks(inputs.leaders if shared else {}, stats) and shared:
        return shared
    for stat in stats.values():
        for t in stat.tensors():
            t.zero_()
    return _pass(model, _Inputs(stats, share=False), calibration)


def _on_all_ranks(leaders: Mapping[Layer, Layer], stats: Mapping[Layer, Statistic]) -> bool:
    """Whether the same layers share on all ranks, where routing may depend on the data."""
    places = {layer: i for i, layer in enumerate(stats)}
    places_here = torch.tensor([places[leaders[x]] if x in leaders else -1 for x in stats])
    total, squares = all_ranks().all_reduce(torch.stack([places_here, places_here.square()]))
    return bool((squares * all_ranks().world_size == total.square()).all())


def _pass(model: nn.Module, inputs: _Inputs, calibration: Calibration) -> dict[Layer, Statistic]:
    by_call = [layer for layer in inputs.stats if layer.reads_arguments]
    by_product = [layer for layer in inputs.stats if not layer.reads_arguments]
    count = _run(model, inputs, calibration, by_call, by_product)
    if count == 0:
        raise ValueError("the calibration data is empty; nothing was pruned")
    missed = torch.tensor([layer not in inputs.leaders for layer in by_call], dtype=torch.int64)
    if bool((all_ranks().all_reduce(missed) == all_ranks().world_size).any()):
        # weights that are used without calling their module
        uncalled = [layer for layer in by_call if layer not in inputs.leaders]
        _run(model, inputs, calibration, [], uncalled)
    inputs.check()
    if missing := [layer.name for layer in inputs.stats if layer not in inputs.leaders]:
        raise ValueError(
            f"no calibration batch reached {', '.join(missing[:5])}; nothing was pruned"
        )
    return {layer: inputs.stats[leader] for layer, leader in inputs.leaders.items()}


def _run(
    model: nn.Module,
    inputs: _Inputs,
    calibration: Calibration,
    by_call: Sequence[Layer],
    by_product: Sequence[Layer],
) -> int:
    """One pass over the data, in which these layers are watched; how many batches it has."""

    def hook(layer: Layer) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        return lambda module, args, kwargs: inputs.add(
            layer, (*args, *kwargs.values())[0], layer.input_matrix
        )

    count = 0
    with contextlib.ExitStack() as stack, undisturbed(model, calibration), torch.no_grad():
        for layer in by_call:
            handle = layer.module.register_forward_pre_hook(hook(layer), with_kwargs=True)
            stack.callback(handle.remove)
        forget = stack.enter_context(products(by_product, inputs.add))
        for batch in track(in_common(model, calibration), "calibration"):
            inputs.real, inputs.last = real_tokens(batch, model), None
            calibration.run(model, batch)
            forget()
            count += 1
    return count
