"""Weights that modules hold themselves, not in a Linear: experts, recurrent ones, projections.

Told by how they lie in the module, since nothing is run here: a stack of experts by its number of
them, attention's projections by their heads, recurrent weights by their class.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from prunus.core.pieces import Piece

_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_COUNTS = ("num_experts", "num_local_experts", "n_experts", "n_routed_experts", "num_expert")
_WIDTHS = ("hidden_size", "d_model", "embed_dim", "dim")
_HEADS = (("n_head", "d_head"), ("num_heads", "head_dim"), ("n_heads", "d_head"))


class RawWeight(NamedTuple):
    """A parameter of a module, or a matrix in it; with `inputs_first`, its rows are the inputs."""

    attribute: str
    piece: Piece | None = None
    inputs_first: bool = False


def raw_weights(module: nn.Module) -> Iterator[RawWeight]:
    """What the module multiplies its inputs with, as far as that can be seen from outside."""
    if isinstance(module, nn.MultiheadAttention):
        present = (name for name in _ATTENTION if getattr(module, name) is not None)
        yield from map(RawWeight, present)
    elif isinstance(module, _RECURRENT):
        yield from (RawWeight(name) for name, p in _own(module) if p.dim() == 2)
    elif isinstance(module, nn.Bilinear):
        yield RawWeight("weight", Piece("flat"))
    else:
        yield from _stacks(module)


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, p) for name, p in module._parameters.items() if p is not None)


def _stacks(module: nn.Module) -> Iterator[RawWeight]:
    cubes = {
        name: tuple(p.shape)
        for name, p in _own(module)
        if not nn.parameter.is_lazy(p) and p.dim() == 3 and min(p.shape) > 1 and p.is_contiguous()
    }
    for name, shape in cubes.items():
        if shape[0] in _widths(module) and shape[1:] in _heads(module):
            # (model, heads, head): the model's axis is what projections to heads read
            yield RawWeight(name, Piece("flat"), name not in ("o", "wo", "o_proj", "out"))
        elif _are_experts(module, shape[0]):
            transposed = _inputs_first(module, name, cubes)
            for i in range(shape[0]):
                yield RawWeight(name, Piece("expert", i, shape[0]), transposed)


def _widths(module: nn.Module) -> set[int]:
    found = (getattr(module, key, None) for key in _WIDTHS)
    return {width for width in found if isinstance(width, int)}


def _heads(module: nn.Module) -> set[tuple[int, int]]:
    pairs = ((getattr(module, a, None), getattr(module, b, None)) for a, b in _HEADS)
    return {(a, b) for a, b in pairs if isinstance(a, int) and isinstance(b, int)}


def _are_experts(module: nn.Module, count: int) -> bool:
    named = any("expert" in cls.__name__.lower() for cls in type(module).__mro__)
    return named or any(getattr(module, key, None) == count for key in _COUNTS)


def _inputs_first(module: nn.Module, name: str, cubes: dict[str, tuple[int, ...]]) -> bool:
    """Whether each expert's matrix is (inputs, outputs): as the module says, else by its shapes."""
    told = getattr(module, "is_transposed", None)
    if isinstance(told, bool):
        return told
    down = name.startswith(("down", "w2", "wo", "output"))
    _, first, second = cubes[name]
    for other, (_, out, inputs) in cubes.items():
        # what goes into the hidden layer comes out of it; gated ones have it twice as wide
        if other != name and out * inputs != first * second:
            return out == second if down else inputs == first
    widths = _widths(module)
    model, hidden = (second, first) if down else (first, second)
    return model in widths and hidden not in widths
