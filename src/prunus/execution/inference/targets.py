"""The layers that may run in another form, and how many rows of inputs they are given."""

from __future__ import annotations

import contextlib
import dis
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prunus.calibration.calibration import Calibration, undisturbed
from prunus.core.layers import CONVS, TRANSPOSED, Layer, all_layers
from prunus.core.masks import count_zeros
from prunus.core.selection import FLOATS
from prunus.core.shared_memory import storage_of
from prunus.core.wrappers import clean_name, is_sharded, unwrap

# in evaluation these read their layers' weights, and do not call the layers
_PARENTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


@dataclass(frozen=True, eq=False)
class Target:
    """A pruned layer; ``refused`` says why it stays dense whatever its zeros are."""

    layer: Layer
    zeros: int
    refused: str = ""

    @property
    def sparsity(self) -> float:
        return self.zeros / max(1, self.layer.weight.numel())


def targets(model: nn.Module) -> Iterator[Target]:
    """Every layer whose weight has zeros."""
    modules = {clean_name(name): module for name, module in unwrap(model).named_modules()}
    owners = _owners(modules)
    for layer in all_layers(model):
        if layer.weight.is_meta:
            continue
        part = layer.local
        if zeros := count_zeros(part):
            parent = modules.get(layer.name.rpartition(".")[0]) if layer.name else None
            message = _refused(layer, parent) or _tied(layer, owners)
            yield Target(layer, zeros, message)


def _refused(layer: Layer, parent: nn.Module | None) -> str:
    module = layer.module
    if isinstance(module, (*CONVS, *TRANSPOSED)):
        return "torch has no sparse kernel for convolutions"
    if isinstance(module, _PARENTS) or isinstance(parent, _PARENTS):
        owner = module if isinstance(module, _PARENTS) else parent
        return f"{type(owner).__name__} computes with the weight without calling the layer"
    if not layer.is_module:
        return f"{layer.kind} computes with a weight of its own, which no kernel here replaces"
    if parent is not None and _reads_weight(type(parent), layer.name.rpartition(".")[2]):
        return f"{type(parent).__name__} reads the weight itself in its forward pass"
    if layer.weight.dtype not in FLOATS:
        return f"its weight is {layer.weight.dtype}"
    if is_sharded(layer.weight):
        return "its weight lies on several ranks"
    if not isinstance(layer.weight, nn.Parameter):
        return "its weight is computed, not stored (is it parametrized?)"
    own = "forward" in module.__dict__
    if own or (isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward):
        return "its forward is not that of a linear layer"
    return ""


def _reads_weight(parent: type[nn.Module], child: str) -> bool:
    """Whether the forward pass of a class, by its bytecode, has ``self.child.weight`` in it.

    There, or in a method that it calls. What it reads by another way goes unseen.
    """
    todo, seen = ["forward"], set[str]()
    while todo:
        method = todo.pop()
        function: Any = getattr(parent, method, None)
        code = getattr(inspect.unwrap(function), "__code__", None)
        if code is None or method in seen:
            continue
        seen.add(method)
        todo += code.co_names
        words = [step.argval for step in dis.get_instructions(code)]
        if (child, "weight") in itertools.pairwise(words):
            return True
    return False


def _owners(modules: dict[str, nn.Module]) -> dict[tuple[int, ...], list[str]]:
    """Names of all parameters by the memory they use; a module with two names counts once."""
    seen: set[nn.Module] = set()
    owners: dict[tuple[int, ...], list[str]] = {}
    for name, module in modules.items():
        if module in seen:
            continue
        seen.add(module)
        for attribute, parameter in module._parameters.items():
            if parameter is not None and not nn.parameter.is_lazy(parameter):
                full = f"{name}.{attribute}" if name else attribute
                owners.setdefault(storage_of(parameter), []).append(full)
    return owners


def _tied(layer: Layer, owners: dict[tuple[int, ...], list[str]]) -> str:
    others = [n for n in owners.get(storage_of(layer.weight), []) if n != layer.parameter_name]
    return f"its weight is tied to {', '.join(others)}" if others else ""


def input_rows(model: nn.Module, layers: Iterable[Layer], example: Any) -> dict[Layer, int]:
    """The most rows that each layer is given in a forward pass on the example, in evaluation mode.

    A layer that it does not reach has no entry. Modes and random states are put back.
    """
    found: dict[Layer, int] = {}

    def watch(layer: Layer) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = (*args, *kwargs.values())[0]
            found[layer] = max(found.get(layer, 0), x.numel() // max(1, x.shape[-1]))

        return hook

    calibration = Calibration([example])
    with contextlib.ExitStack() as stack, undisturbed(model, calibration), torch.no_grad():
        for layer in layers:
            handle = layer.module.register_forward_pre_hook(watch(layer), with_kwargs=True)
            stack.callback(handle.remove)
        calibration.run(model, example)
    return found
