"""Layers that gather their input: the permutation is taken back at run time, by an index.

For layers whose input others read too. The index is a buffer of the layer, ``input_permutation``,
so it is saved with the weights; `restore_gathers` makes a fresh model ready to load them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunus.core.layers import Layer
from prunus.core.wrappers import clean_name, unwrap
from prunus.engine.permute.folds import Fold, FoldError, FoldPlan, Move
from prunus.engine.permute.graph import Network, as_layer, straight

BUFFER = "input_permutation"

# layers below one parent that read the same input
SETS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("fc1_g", "fc1_x"),
    ("w1", "w3"),
)
# layers that read the residual stream alone
ALONE = (
    "lm_head",
    "qkv",
    "qkv_proj",
    "c_attn",
    "c_fc",
    "fc1",
    "gate_up_proj",
    "intermediate.dense",
)


def sharing(layer: Layer) -> str:
    """Why no rule covers a layer, as far as its name tells."""
    last = layer.name.rpartition(".")[2]
    shared = next((", ".join(n for n in names if n != last) for names in SETS if last in names), "")
    if not shared and f".{layer.name}".endswith(tuple(f".{name}" for name in ALONE)):
        shared = "the rest of the residual stream"
    if shared:
        return f"its input is shared with {shared}; see shared='residual' or 'gather'"
    return "no rule knows what writes its input"


def _gather_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    # channels come last for linear layers, before the spatial dimensions for convolutions; a
    # linear layer's weight is not asked, because an accelerated one computes it
    dim = -1 if isinstance(module, nn.Linear) else 1 - module.weight.dim()  # type: ignore[operator]
    return args[0].index_select(dim, getattr(module, BUFFER)), *args[1:]


def _set(module: nn.Module, index: Tensor) -> None:
    """Make the module gather; an index that is the identity takes hook and buffer away."""
    hooks = module._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is _gather_input]:
        del hooks[key]
    module._buffers.pop(BUFFER, None)
    if torch.equal(index, torch.arange(len(index))):
        return
    weight: Any = module.weight
    module.register_buffer(BUFFER, index.to(weight.device))
    # first of all hooks, so that whoever records the layer's inputs sees them gathered
    module.register_forward_pre_hook(_gather_input, prepend=True)


@dataclass(frozen=True, eq=False)
class Gathering:
    """The index by which a layer takes its input; an order that is new composes with it."""

    module: nn.Module
    fold: Fold

    def index(self) -> Tensor:
        """(channels,) on the CPU."""
        channels: Tensor = torch.arange(self.fold.readers[0].channels())
        return getattr(self.module, BUFFER, channels).cpu()

    def permute(self, perms: Tensor) -> None:
        _set(self.module, self.index()[self.fold.columns(perms)])

    def saved(self) -> Callable[[], None]:
        return partial(_set, self.module, self.index())


class GatherFold(Fold):
    """A fold whose readers take their own input in the order in which their columns are stored."""

    def moves(self) -> Sequence[Move]:
        """The columns, then what readers gather by; a second order composes with the first."""
        return *self.slots, *(Gathering(reader.module, self) for reader in self.readers)


def restore_gathers(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Let the layers of a fresh model gather as those did whose state dict this is.

    After it the state dict loads, whose keys may carry wrappers' prefixes. Raises ValueError for a
    layer that the model has not, or with another number of input channels.
    """
    modules = {clean_name(name): module for name, module in unwrap(model).named_modules()}
    found: list[tuple[nn.Module, Tensor]] = []
    for key, index in state.items():
        name, _, attribute = clean_name(key).rpartition(".")
        if attribute != BUFFER:
            continue
        layer = as_layer(modules[name]) if name in modules else None
        if layer is None or layer.channels() != len(index):
            raise ValueError(
                f"state={key!r} permutes {len(index)} inputs of a layer that this model has not; "
                "build the model that was saved"
            )
        found.append((layer.module, index.cpu()))
    for module, index in found:
        _set(module, index)


def _fold(net: Network, readers: Sequence[Layer]) -> Fold:
    positions = straight(1, 1, readers[0].channels())
    for reader in readers:
        parent = net.modules[reader.name.rpartition(".")[0]] if reader.name else net.model
        if isinstance(parent, nn.MultiheadAttention):
            raise FoldError(f"{reader.name} is computed by its parent, so it cannot gather")
    slots = [net.reads(reader, positions) for reader in readers]
    name = f"{', '.join(reader.name for reader in readers)} <- {BUFFER}"
    fold = net.fold(name, "gather", tuple(readers), positions, slots)
    # the layer alone would not show that its parent uses the weight without calling it
    scope = net.scope(reader.name.rpartition(".")[0] for reader in readers)
    return GatherFold(name, fold.kind, fold.readers, positions, fold.slots, scope, fold.names)


def gather_folds(net: Network, layers: Sequence[Layer]) -> FoldPlan:
    """One fold for each set of layers that share an input, of those that are given."""
    sets: dict[tuple[object, ...], list[Layer]] = {}
    for layer in layers:
        parent, _, last = layer.name.rpartition(".")
        known = next((names for names in SETS if last in names), None)
        key = (parent, known, layer.channels()) if known else (layer.name,)
        sets.setdefault(key, []).append(layer)
    folds: list[Fold] = []
    refused: dict[str, str] = {}
    for readers in sets.values():
        try:
            folds.append(_fold(net, readers))
        except FoldError as reason:
            refused |= {reader.name: str(reason) for reader in readers}
    return FoldPlan(tuple(folds), refused)
