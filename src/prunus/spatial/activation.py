"""Dense 2-D networks with sparse activations: trained dense, then run on sites alone.

A convolution keeps only the strongest sites of its input, and outputs nothing at the others, as a
submanifold convolution does. In training that is a mask on both sides of the dense convolution, and
gradients go through the sites that are kept; `run_sparse` puts a `SubMConv2d` in its place, which
computes the same at a share of the products.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from prunus.spatial.convolution import SparseConvolution, SubMConv2d
from prunus.spatial.tensor import Sites, SparseTensor


class SiteChoice:
    """Which sites of a dense map stay: a share of each example's, or those above a threshold.

    A site's strength is the Euclidean norm of its channels.
    """

    def __init__(self, share: float | None = None, threshold: float | None = None) -> None:
        if (share is None) == (threshold is None):
            raise ValueError("give either share= or threshold=, to say which sites stay")
        if share is not None and not 0 < share <= 1:
            raise ValueError(f"share={share}; use more than 0 and at most 1")
        if threshold is not None and not threshold >= 0:
            raise ValueError(f"threshold={threshold}; use 0 or more")
        self.share, self.threshold = share, threshold

    def __repr__(self) -> str:
        text = f"share={self.share}" if self.threshold is None else f"threshold={self.threshold}"
        return f"SiteChoice({text})"

    @torch.no_grad()
    def mask(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) -> (batch, 1, height, width) booleans."""
        strength = torch.linalg.vector_norm(x.float(), dim=1, keepdim=True)
        if self.threshold is not None:
            above: Tensor = strength > self.threshold
            return above
        assert self.share is not None
        flat = strength.flatten(1)
        kept = max(1, round(self.share * flat.shape[1]))
        chosen = torch.zeros_like(flat, dtype=torch.bool)
        chosen.scatter_(1, flat.topk(kept, dim=1).indices, True)
        return chosen.view_as(strength)


class SparseInputs:
    """Masks on both sides of some convolutions of a model, while it is trained."""

    def __init__(self, model: nn.Module, names: Iterable[str], choice: SiteChoice) -> None:
        self.choice = choice
        modules = dict(model.named_modules())
        self.names = list(names)
        for name in self.names:
            check_convolution(name, modules.get(name))
        self.density: dict[str, float] = {}
        """share of sites kept in the last forward pass of each layer"""
        self._masks: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        for name in self.names:
            self._attach(name, modules[name])

    def _attach(self, name: str, module: nn.Module) -> None:
        def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            mask = self._masks[name] = self.choice.mask(args[0])
            self.density[name] = float(mask.float().mean())
            return (args[0] * mask, *args[1:])

        def after(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            return output * self._masks.pop(name)

        self._handles += [
            module.register_forward_pre_hook(before),
            module.register_forward_hook(after),
        ]

    def remove(self) -> None:
        """Take the masks off; the convolutions are dense again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


class SubMConvOnDense(nn.Module):
    """A `SubMConv2d` between dense maps: chooses the sites, and computes at those alone."""

    def __init__(self, conv: SubMConv2d, choice: SiteChoice) -> None:
        super().__init__()
        self.conv, self.choice = conv, choice

    def forward(self, x: Tensor) -> Tensor:
        mask = self.choice.mask(x).squeeze(1)
        sites = Sites(mask.nonzero().int(), tuple(x.shape[2:]), len(x))
        features = x.movedim(1, -1)[mask]
        output: Tensor = self.conv(SparseTensor.at(features, sites)).dense()
        return output

    def extra_repr(self) -> str:
        return repr(self.choice)


def sparse_inputs(
    model: nn.Module,
    layers: Iterable[str],
    *,
    share: float | None = None,
    threshold: float | None = None,
) -> SparseInputs:
    """Make the inputs of named convolutions sparse from here on; `run_sparse` makes use of it.

    They have stride 1 and keep the size of their input. ``share`` of each example's sites stays, or
    those whose norm is above ``threshold``.

    >>> import torch
    >>> from prunus import spatial
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3, padding=1))
    >>> masks = spatial.sparse_inputs(model, ["0"], share=0.25)
    >>> x = torch.randn(2, 4, 8, 8)
    >>> expected = model(x)
    >>> spatial.run_sparse(model, masks)
    >>> torch.allclose(model(x), expected, atol=1e-5)
    True
    """
    return SparseInputs(model, layers, SiteChoice(share, threshold))


def run_sparse(model: nn.Module, masks: SparseInputs, dataflow: str = "implicit") -> None:
    """Replace the convolutions by submanifold ones, in place, and take the masks off."""
    modules = dict(model.named_modules())
    masks.remove()
    for name in masks.names:
        parent, _, child = name.rpartition(".")
        conv: Any = modules[name]
        sparse = SubMConv2d(
            conv.in_channels, conv.out_channels, conv.kernel_size, dilation=conv.dilation,
            bias=conv.bias is not None, dataflow=dataflow, device=conv.weight.device,
            dtype=conv.weight.dtype,
        )  # fmt: skip
        sparse.weight, sparse.bias = conv.weight, conv.bias
        replacement = SubMConvOnDense(sparse, masks.choice).train(conv.training)
        setattr(modules[parent], child, replacement)


def check_convolution(name: str, module: nn.Module | None) -> None:
    """Raises ValueError for what cannot run as a submanifold convolution."""
    if not isinstance(module, nn.Conv2d) or isinstance(module, SparseConvolution):
        kind = "nothing" if module is None else type(module).__name__
        raise ValueError(f"{name!r} is {kind}; sparse inputs are for Conv2d")
    centred = tuple(k // 2 * d for k, d in zip(module.kernel_size, module.dilation, strict=True))
    padding = centred if module.padding == "same" else module.padding
    odd = all(k % 2 for k in module.kernel_size)
    plain = module.groups == 1 and module.stride == (1, 1) and module.padding_mode == "zeros"
    if not (odd and plain and padding == centred):
        raise ValueError(
            f"{name!r} is no centred convolution of stride 1 and one group; leave it out: {module}"
        )
