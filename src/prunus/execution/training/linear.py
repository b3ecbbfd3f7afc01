"""Linear layers that are 2:4 both ways while they compute; their Parameters stay dense."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from prunus.core.wrappers import is_sharded
from prunus.execution.training import kernels
from prunus.execution.training.options import SemiSparse
from prunus.execution.training.straight import masked
from prunus.execution.training.tiles import tile_mask, tile_mask_in_graph

S = TypeVar("S", bound="_SemiSparse")


class _SemiSparse(nn.Linear):
    """What both kinds share. A layer becomes one of them, and dense again, by its class alone."""

    options = SemiSparse()

    @classmethod
    def from_dense(cls: type[S], linear: nn.Linear, options: SemiSparse | None = None) -> S:
        """The same module, of this class from now on: Parameters, hooks and names stay.

        Raises ValueError, with nothing changed, for a layer that cannot be one.
        """
        options = options or cls.options
        if why := no_semi_sparse(linear, options):
            raise ValueError(f"this {type(linear).__name__} {why}")
        if isinstance(linear, _SemiSparse):
            linear = linear.to_dense(linear)
        linear.__class__ = cls
        assert isinstance(linear, cls)
        linear.options = options
        linear._begin()
        return linear

    @classmethod
    def to_dense(cls, layer: _SemiSparse) -> nn.Linear:
        """The same module, an ordinary Linear from now on, with the weights as they are."""
        for name in ("options", *_STATE):
            vars(layer).pop(name, None)
        layer.__class__ = nn.Linear  # type: ignore[assignment]
        return layer

    def _begin(self) -> None:
        pass

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rule={self.options.rule}, {self.options.gradient}"


class SemiSparseLinear(_SemiSparse):
    """A Linear that computes with ``weight * mask``, the mask 2:4 along both sides.

    Forward and the gradient of the input are products with the sparse weight, the gradient of the
    weight is a dense product; `SemiSparse.gradient` says what becomes of it. On sparse tensor cores
    for fp16 and bf16 (autocast included), else the same numbers by dense products.

    The mask is that of the weight: the first forward pass after every ``refresh``-th update of the
    weight (``weight._version``) chooses it anew, in training and in evaluation. A compiled model
    does so in its graph where ``refresh`` is 1, and else keeps the stored mask: call
    `refresh_masks` after each optimizer step. Writing to ``weight.data`` counts as no update: train
    with ``refresh=0`` and that same call if your optimizer does so.
    """

    tile_mask: Tensor | None = None
    """boolean (out, in), the mask chosen last"""
    flips: Tensor | None = None
    """share of the mask's entries that changed when it was chosen last; None before"""
    _seen = -1
    _updates = 0
    _given = False

    def _begin(self) -> None:
        if not self.weight.is_meta:
            self.choose_mask()

    @torch.inference_mode(False)  # training goes on with a mask that an evaluation has chosen
    @torch.no_grad()
    def choose_mask(self) -> None:
        """Choose the mask of the present weight, now."""
        before = self.tile_mask
        self.tile_mask = tile_mask(self.weight, self.options.rule)
        self.flips = None
        if before is not None:
            before = before.to(self.tile_mask.device)
            self.flips = (before != self.tile_mask).sum() / max(1, before.numel())
        self._seen, self._updates, self._given = self.weight._version, 0, False

    def refresh(self) -> None:
        """Choose the mask anew if the weight has changed and it is time."""
        if self.tile_mask is None:
            return self.choose_mask()
        if self.tile_mask.device != self.weight.device:
            with torch.inference_mode(False):
                self.tile_mask = self.tile_mask.to(self.weight.device)
        if self.weight._version != self._seen:
            self._seen, self._updates = self.weight._version, self._updates + 1
            if self._updates == self.options.refresh:
                self.choose_mask()
        return None

    @torch.inference_mode(False)
    def give_mask(self, mask: Tensor) -> None:
        """Go on with a mask from elsewhere, boolean (out, in), until the next one is due.

        Loading weights, which else chooses the mask anew, leaves this one. Raises ValueError for
        another shape.
        """
        if mask.shape != self.weight.shape:
            shapes = f"{tuple(mask.shape)}; the weight is {tuple(self.weight.shape)}"
            raise ValueError(f"the mask is {shapes}: is it of another model?")
        self.tile_mask, self.flips = mask.to(self.weight.device, copy=True), None
        self._seen, self._updates, self._given = self.weight._version, 0, True

    def mask(self) -> Tensor:
        """Boolean (out, in): what the present forward pass computes with."""
        compiling = torch.compiler.is_compiling()
        if compiling and self.options.refresh == 1:
            in_graph: Tensor = tile_mask_in_graph(self.weight.detach(), self.options.rule)
            return in_graph
        if not compiling:
            self.refresh()
        assert self.tile_mask is not None, "weights on the meta device have no mask"
        return self.tile_mask

    def forward(self, x: Tensor) -> Tensor:
        options, mask = self.options, self.mask()
        weight = masked(self.weight, mask, options.gradient, options.decay)
        if kernels.available(x, weight) and not _odd(self.weight.shape):
            y: Tensor = kernels.sparse_weight_linear(x, weight, self.bias)
            return y
        return nn.functional.linear(x, weight, self.bias)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self._given and not self.weight.is_meta:
            self.choose_mask()
            self.flips = None  # other weights, not training

    # a copy's weight counts its versions anew, so that only the distance means something
    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {**state, "_seen": self._seen - self.weight._version}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._seen += self.weight._version


_STATE = ("tile_mask", "flips", "_seen", "_updates", "_given")


class SemiSparseActivationLinear(_SemiSparse):
    """A Linear whose input is made 2:4 along both sides in each forward pass; its weight is dense.

    Forward and the gradient of the weight are products with the sparse input, the gradient of the
    input is a dense product, passed on past the mask or masked. Tiles run over four consecutive
    rows of the input (tokens) and four features; missing rows count as zeros.
    """

    options = SemiSparse(kind="activation")

    def forward(self, x: Tensor) -> Tensor:
        fast = kernels.available(x, self.weight) and not x.shape[-1] % kernels.MULTIPLE
        fast = fast and not self.out_features % kernels.DENSE_MULTIPLE
        flat = x.reshape(-1, x.shape[-1])
        rows = kernels.pad_rows(flat, kernels.MULTIPLE_CUSPARSELT if fast else 4)
        choose = tile_mask_in_graph if torch.compiler.is_compiling() else tile_mask
        mask = choose(rows.detach(), self.options.rule)
        rows = masked(rows, mask, self.options.gradient, 0.0)
        linear = kernels.sparse_input_linear if fast else nn.functional.linear
        y = linear(rows, self.weight, self.bias)[: len(flat)]
        return y.reshape(*x.shape[:-1], self.out_features)


KINDS: dict[str, type[_SemiSparse]] = {
    "weight": SemiSparseLinear,
    "activation": SemiSparseActivationLinear,
}


def _odd(shape: torch.Size) -> bool:
    return any(side % kernels.MULTIPLE for side in shape)


def no_semi_sparse(linear: nn.Linear, options: SemiSparse) -> str:
    """Why a layer cannot be semi-sparse, as the end of a sentence; empty if it can."""
    weight: Any = linear.weight
    if is_sharded(weight):
        return "is sharded by FSDP2, whose class it would lose; use DDP, or leave it out"
    if type(linear) not in (nn.Linear, *KINDS.values()):
        return "computes by a class of its own, which a swap would drop; leave it out"
    if not isinstance(weight, nn.Parameter):
        return "has a computed weight (parametrized or pruned by torch.nn.utils?); remove that"
    if "forward" in vars(linear):
        return "has a forward of its own on the instance (a wrapper's?), which hides a class's"
    return _no_tiles(weight, options)


def _no_tiles(weight: Tensor, options: SemiSparse) -> str:
    out_features, in_features = weight.shape
    sides = {"in_features": in_features}
    if options.kind == "weight":
        sides["out_features"] = out_features
    for name, side in sides.items():
        for multiple, whose in ((4, "tiles are 4 x 4"), (kernels.MULTIPLE, "the kernels on CUDA")):
            if side % multiple and (multiple == 4 or weight.is_cuda):
                return f"has {name}={side}, no multiple of {multiple} ({whose}); leave it out"
    if weight.is_cuda and out_features % kernels.DENSE_MULTIPLE:
        return f"has out_features={out_features}, no multiple of 8 (the kernels on CUDA)"
    return ""
