"""What reads a model's input and what writes its output, seen in one forward pass.

Every tensor carries its origin: the input as it was given, or the weights whose products it is made
of. Shapes, sums, activations and normalizations pass that on; a product with a weight begins anew.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from prunus.core.layers import CONVS, Layer
from prunus.core.shared_memory import storage_of
from prunus.core.wrappers import unwrap

PRODUCTS = re.compile(
    r"mm|bmm|addmm|addbmm|baddbmm|mv|addmv|dot|_addmm_activation|linear|mkldnn_linear\w*|cdist"
    r"|\w*convolution\w*|\w*conv[123]d\w*|_?(scaled_)?grouped_mm|_scaled_mm|_trilinear"
    r"|\w*(lstm|gru|rnn)\w*|_native_multi_head_attention"
)
SUMS = {"add", "sub", "addcmul", "lerp", "index_add", "cat"}
INNER = re.compile(r"hidden_state|attentions|past_key_values|mems|feature_maps|cache|^states?$")
"""outputs of transformers that the next layer reads, or that are there to be looked at"""
UNSEEN = 1
"""the bit of weights that are no layers"""


class Origin(NamedTuple):
    """Where a tensor comes from. Sets of weights are the bits of an integer."""

    batch: int = 0
    """of a float input that no weight has read yet: its first dimension; else 0"""
    pixels: bool = False
    """whether that input has four axes or more"""
    weights: int = 0
    """what it is computed from, where that is weights alone"""
    wrote: int = 0
    """weights whose products it consists of"""
    read: int = 0
    """weights whose products others have read on the way to it"""
    stream: bool = False
    """whether something has been added to what it was computed from, as blocks do"""
    held: int = 0
    """what it consisted of when it was detached: a starting point for what is added to it"""
    depth: int = 0
    """0: not of the input, 1: of the input as it was given, 2: of what weights made of it"""


class Ends(NamedTuple):
    """What a forward pass has shown of the layers."""

    reading: list[Layer]
    writing: list[Layer]
    choosing: list[Layer]
    """their outputs were ranked along the layer's outputs, as a router's are"""
    reached: list[Layer]


def traced_ends(
    model: nn.Module, layers: Sequence[Layer], run: Callable[[], object]
) -> Ends | None:
    """The layers at the ends in the forward pass that `run` makes; None if it calls no model.

    Raises whatever `run` raises.
    """
    watch, inner = _Watch(layers), unwrap(model)
    fast = torch.backends.mha.get_fastpath_enabled()
    hooks = [
        inner.register_forward_pre_hook(watch.enter, with_kwargs=True),
        inner.register_forward_hook(watch.leave),
    ]
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with watch, torch.no_grad():
            run()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for hook in hooks:
            hook.remove()
    return watch.ends() if watch.returned else None


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.origins: Any = WeakTensorKeyDictionary()
        self.bits: dict[tuple[int, ...], int] = {}
        self.layers: dict[int, list[Layer]] = {}
        for layer in layers:
            bit = self.bits.setdefault(storage_of(layer.weight), 2 << len(self.bits))
            self.layers.setdefault(bit, []).append(layer)
        self.reading = self.writing = self.inner = self.choosing = self.reached = 0
        self.returned = False

    def of(self, t: Tensor) -> Origin:
        found: Origin | None = self.origins.get(t)
        if found is None and isinstance(t, nn.Parameter) and t.dim() > 1:
            return Origin(weights=self.bits.get(storage_of(t), UNSEEN))
        return found or Origin()

    def enter(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        for t in _tensors((args, kwargs)):
            raw = t.is_floating_point() and t.dim() > 0
            self.origins[t] = Origin(len(t) if raw else 0, raw and t.dim() > 3, depth=1)

    def leave(self, _: nn.Module, __: Any, output: Any) -> None:
        self.returned = True
        for name, value in _named(output):
            for origin in map(self.of, _tensors(value)):
                if INNER.search(name):
                    self.inner |= origin.wrote or origin.held
                elif not origin.stream:
                    self.writing |= origin.wrote or origin.held

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        operands = list(_tensors((args, kwargs)))
        origins = [self.of(t) for t in operands]
        out = func(*args, **(kwargs or {}))
        origin = self._made(func.overloadpacket.__name__.rstrip("_"), args, operands, origins)
        if origin == Origin():
            return out
        for t in _tensors(out):
            self.origins[t] = origin
            if t._base is not None and any(t is x for x in operands):  # written through a view
                self.origins[t._base] = _joined([self.of(t._base), origin])
        return out

    def _made(
        self, name: str, args: tuple[Any, ...], operands: list[Tensor], origins: list[Origin]
    ) -> Origin:
        """The origin of what an operation makes of its operands."""
        joined = _joined(origins)
        if name == "embedding":
            return Origin(depth=2 * min(1, joined.depth))
        if name in ("topk", "argmax") and operands:
            self._rank(operands[0], origins[0], args[name == "topk" :][1:2])
        weights = reduce(or_, (origin.weights for origin in origins), 0)
        if PRODUCTS.fullmatch(name) and weights and joined.depth:
            return self._product(operands, origins, weights)
        if name == "detach":
            held = 0 if joined.stream else joined.wrote | joined.held
            return joined._replace(wrote=0, held=held, stream=False)
        if name in SUMS:
            return joined._replace(stream=_is_stream(origins))
        return joined

    def _product(self, operands: list[Tensor], origins: list[Origin], weights: int) -> Origin:
        self.reached |= weights
        for t, origin in zip(operands, origins, strict=True):
            if origin.batch:
                patches = origin.pixels and t.numel() // max(1, t.shape[-1]) > origin.batch
                self.reading |= sum(
                    bit
                    for bit, (layer, *_) in self.layers.items()
                    if bit & weights and (patches or isinstance(layer.module, CONVS))
                )
        read = reduce(or_, (origin.read | origin.wrote for origin in origins))
        return Origin(wrote=weights & ~UNSEEN, read=read, depth=2)

    def _rank(self, t: Tensor, origin: Origin, dim: Sequence[Any]) -> None:
        """Note the layers among whose outputs the highest are found."""
        width = t.shape[dim[0] if dim and isinstance(dim[0], int) else -1] if t.dim() else 1
        for bit, (layer, *_) in self.layers.items():
            if bit & origin.wrote and layer.matrix_shape()[0] == width > 1:
                self.choosing |= bit

    def ends(self) -> Ends:
        writing = self.writing & ~self.inner
        sets = self.reading, writing, self.choosing & ~writing, self.reached
        return Ends(*map(self._of_bits, sets))

    def _of_bits(self, bits: int) -> list[Layer]:
        return [layer for bit, same in self.layers.items() if bit & bits for layer in same]


def _named(output: Any) -> Iterator[tuple[str, Any]]:
    """The parts of an output that are meant for whoever called, by name where they have one."""
    if hasattr(output, "__dataclass_fields__") and not isinstance(output, Mapping):
        output = vars(output)
    elif hasattr(output, "_asdict"):
        output = output._asdict()
    if not isinstance(output, Mapping):
        yield "", output
        return
    for name, value in output.items():
        if name != "loss" and not isinstance(value, Mapping):  # mappings are outputs of parts
            yield str(name), value


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _joined(origins: Sequence[Origin]) -> Origin:
    """Of something that is computed from all of them."""
    depth = max((origin.depth for origin in origins), default=0)
    # an input that meets what was made of it is an input no more
    raw = [origin for origin in origins if origin.batch] if depth < 2 else []
    weights, wrote, read, held = (
        reduce(or_, (getattr(origin, name) for origin in origins), 0)
        for name in ("weights", "wrote", "read", "held")
    )
    return Origin(
        batch=max((origin.batch for origin in raw), default=0),
        pixels=any(origin.pixels for origin in raw),
        weights=0 if depth else weights,
        wrote=wrote | (weights & ~UNSEEN if depth else 0),
        read=read,
        stream=any(origin.stream for origin in origins),
        held=held,
        depth=depth,
    )


def _is_stream(origins: Sequence[Origin]) -> bool:
    """Whether something is added to what it was computed from, now or before."""
    added = any(a.wrote & b.read for a in origins for b in origins if a is not b)
    return added or any(origin.stream for origin in origins)
