"""One real forward pass with the labels beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prunus.channels import ops
from prunus.channels.inputs import run
from prunus.channels.labels import LabelMap
from prunus.channels.trace import HANDLERS, Operation, Trace

_BUFFERS = ("running_mean", "running_var", "weight", "bias")
_COUNTED = ("convolution", "mm", "addmm", "bmm", "baddbmm")


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Calls the handler of each operation; an unknown one freezes what it touches."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = trace

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        trace = self.trace
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        trace.used.update(map(id, tensors))
        name = func._schema.name.removeprefix("aten::")
        handler = HANDLERS.get(name) or HANDLERS.get(name.removesuffix("_"))
        if any(t in trace.maps for t in tensors):
            op = Operation(name, func, args, kwargs, out, trace.where or "the model")
            if handler is None:
                trace.unknown.setdefault(name, op.where)
                for t in tensors:
                    trace.freeze(trace.of(t), f"unknown operation {op.reason}")
            else:
                handler(trace, op)
        elif name in _COUNTED:
            handler(trace, Operation(name, func, args, kwargs, out, trace.where or "the model"))  # type: ignore[misc]
        return out


@contextlib.contextmanager
def _module_stack(model: nn.Module, trace: Trace) -> Iterator[None]:
    """While a module runs, its name and it are on top of the trace's stack."""

    def enter(name: str, module: nn.Module, args: Any) -> None:
        trace.stack.append((name, module))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        trace.stack.pop()

    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            hook = _named(enter, name)
            stack.callback(module.register_forward_pre_hook(hook).remove)
            stack.callback(module.register_forward_hook(leave, always_call=False).remove)
        yield


def _named(enter: Callable[[str, nn.Module, Any], None], name: str) -> Any:
    return lambda module, args: enter(name, module, args)


def label_parameters(trace: Trace, model: nn.Module) -> None:
    """A label for each slice along each axis of each parameter and buffer, but kernels' axes.

    Of the buffers only statistics and scales are channels; others (rotary frequencies, positions,
    masks) are of fixed size.
    """
    buffers = [(n, t) for n, t in model.named_buffers() if n.rpartition(".")[2] in _BUFFERS]
    named = [*model.named_parameters(), *buffers]
    for name, t in named:
        dims = range(2) if t.dim() >= 3 and _is_kernel(model, name) else range(t.dim())
        axes, maps = [], []
        for d in dims:
            if t.shape[d] > 1:
                ids = trace.coupling.new(t.shape[d])
                axes.append((d, ids))
                view = [-1 if i == d else 1 for i in range(t.dim())]
                maps.append(LabelMap(ids.view(view)))
        trace.parameters[name] = axes
        trace.put(t, maps)


def _is_kernel(model: nn.Module, name: str) -> bool:
    module = model.get_submodule(name.rpartition(".")[0])
    return isinstance(module, nn.modules.conv._ConvNd)


@contextlib.contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, caches and fused attention; put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    config = getattr(model, "config", None)
    cache = getattr(config, "use_cache", None)
    fast = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        if cache:
            config.use_cache = False  # type: ignore[union-attr]
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        if cache:
            config.use_cache = cache  # type: ignore[union-attr]
        for module, mode in modes:
            module.training = mode


def output_tensors(output: Any) -> list[Tensor]:
    """Tensors in nested tuples, lists, mappings and dataclasses."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    elif hasattr(output, "__dataclass_fields__"):
        output = list(vars(output).values())
    if isinstance(output, (tuple, list)):
        return [t for item in output for t in output_tensors(item)]
    return []


def trace_model(model: nn.Module, example_inputs: Any) -> Trace:
    """Run the model once and return what its operations say; outputs are never removed."""
    assert ops  # its handlers register themselves
    trace = Trace()
    label_parameters(trace, model)
    with quiet(model), _module_stack(model, trace), Recorder(trace):
        outputs = run(model, example_inputs)
    for t in output_tensors(outputs):
        trace.freeze(trace.of(t), "it is the model's output")
    _freeze_what_cannot_follow(trace, model)
    return trace


def _freeze_what_cannot_follow(trace: Trace, model: nn.Module) -> None:
    """Parameters that no operation read, and modules whose code allows one width only."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, axes in trace.parameters.items():
        module = model.get_submodule(name.rpartition(".")[0])
        reason = "" if id(tensors[name]) in trace.used else "this forward pass does not read it"
        if isinstance(module, nn.MultiheadAttention) or _inside_attention(model, name):
            reason = "nn.MultiheadAttention has as many channels in its heads as outside"
        for _, ids in axes:
            if reason:
                trace.coupling.freeze(ids, reason)


def _inside_attention(model: nn.Module, name: str) -> bool:
    parent = name.rpartition(".")[0].rpartition(".")[0]
    return isinstance(model.get_submodule(parent), nn.MultiheadAttention)
