"""Making layers of a model semi-sparse and dense again, by name."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from torch import nn

from prunus.core.selection import match_names
from prunus.core.wrappers import clean_name, unwrap
from prunus.execution.training.linear import (
    KINDS,
    SemiSparseActivationLinear,
    SemiSparseLinear,
    no_semi_sparse,
)
from prunus.execution.training.options import SemiSparse

Choice = type[SemiSparseLinear] | type[SemiSparseActivationLinear] | SemiSparse
Named = tuple[str, nn.Linear]


def linears(model: nn.Module) -> list[Named]:
    """(clean name, module) of every Linear, each module once."""
    named = unwrap(model).named_modules()
    return [(clean_name(name), m) for name, m in named if isinstance(m, nn.Linear)]


def _options(choice: Choice) -> SemiSparse:
    if isinstance(choice, SemiSparse):
        return choice
    if choice not in KINDS.values():
        names = " or ".join(cls.__name__ for cls in KINDS.values())
        raise ValueError(f"config holds {choice!r}; give {names}, or a SemiSparse(...)")
    return choice.options


def check_semi_sparse(layers: list[Named], options: SemiSparse) -> None:
    """Raises ValueError naming the first layer that cannot be semi-sparse, and why."""
    for name, layer in layers:
        if why := no_semi_sparse(layer, options):
            raise ValueError(f"{name} ({type(layer).__name__}) {why}")


def swap_layers(layers: list[Named], options: SemiSparse) -> None:
    """Make these layers semi-sparse, in place; `check_semi_sparse` has passed them."""
    for _, layer in layers:
        KINDS[options.kind].from_dense(layer, options)


def to_dense(layers: list[Named]) -> None:
    """Make these layers ordinary ones again; those that are stay so."""
    for _, layer in layers:
        if isinstance(layer, SemiSparseLinear | SemiSparseActivationLinear):
            layer.to_dense(layer)


def swap_linear_with_semi_sparse_linear(model: nn.Module, config: Mapping[str, Choice]) -> None:
    """Make the named Linear layers of a model semi-sparse, in place.

    ``config`` maps fully qualified names, globs or ``re:`` regexes to `SemiSparseLinear`,
    `SemiSparseActivationLinear` or a `SemiSparse` with other settings. Modules, Parameters (so the
    optimizer's state), hooks and ``state_dict`` keys stay. Works through DDP and torch.compile.
    The call of torchao's former ``torchao.sparsity.training``.

    Raises ValueError, with nothing changed, for a name that matches no Linear, for a layer that
    two entries give different settings, and for one that cannot be semi-sparse: its sides are no
    multiples of 4 (on CUDA of 64), its class is not Linear itself, FSDP2 shards it.
    """
    candidates, chosen = linears(model), dict[str, tuple[str, SemiSparse]]()
    for pattern, choice in config.items():
        options = _options(choice)
        for name, _ in match_names(candidates, lambda item: [item[0]], [pattern], "layer"):
            other, theirs = chosen.setdefault(name, (pattern, options))
            if theirs != options:
                raise ValueError(f"{name} is in both {other!r} and {pattern!r}; leave one out")
    named = dict(candidates)
    for name, (_, options) in chosen.items():
        check_semi_sparse([(name, named[name])], options)
    for name, (_, options) in chosen.items():
        swap_layers([(name, named[name])], options)


def swap_semi_sparse_linear_with_linear(model: nn.Module) -> None:
    """Make all semi-sparse layers of a model ordinary ones again, their weights as they are."""
    to_dense(linears(model))


def sparse_weights(model: nn.Module) -> Iterator[tuple[str, SemiSparseLinear]]:
    """(clean name, layer) of the layers whose weights are semi-sparse."""
    for name, layer in linears(model):
        if isinstance(layer, SemiSparseLinear):
            yield name, layer


def refresh_masks(model: nn.Module) -> None:
    """After an optimizer step: choose the masks anew that are due.

    That is after every ``refresh``-th call between which the weight has changed, and with
    ``refresh=0`` in every call. An eager model does the first by itself, in its forward pass;
    compiled ones need the call where ``refresh`` is not 1.
    """
    for _, layer in sparse_weights(model):
        if layer.options.refresh:
            layer.refresh()
        else:
            layer.choose_mask()


def flip_rates(model: nn.Module) -> dict[str, float]:
    """By layer, the share of mask entries that changed when its mask was last chosen anew.

    A layer whose mask is still its first is left out. It falls as training settles; one that
    stays high says that masks change too often, one near zero too rarely (Hu et al., "Accelerating
    Transformer Pre-training with 2:4 Sparsity", 2024, https://arxiv.org/abs/2404.01847).
    """
    return {n: float(m.flips) for n, m in sparse_weights(model) if m.flips is not None}


def flip_rate(model: nn.Module) -> float:
    """`flip_rates` of all weights together, in [0, 1]; NaN while all masks are their first."""
    rates = flip_rates(model)
    sizes = {name: m.weight.numel() for name, m in sparse_weights(model) if name in rates}
    if not sizes:
        return math.nan
    return sum(rates[name] * size for name, size in sizes.items()) / sum(sizes.values())
