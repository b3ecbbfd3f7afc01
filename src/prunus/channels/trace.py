"""One real forward pass, with the labels pushed through every operation that happens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from prunus.channels.inputs import run
from prunus.channels.labels import Coupling, Labelled, LabelMap, Shape

_BUFFERS = ("running_mean", "running_var", "weight", "bias")
ZeroRule = Callable[[Sequence["bool | None"]], bool]
Handler = Callable[["Trace", "Operation"], None]
HANDLERS: dict[str, Handler] = {}


def any_zero(flags: Sequence[bool | None]) -> bool:
    """Products are zero where one factor is."""
    return any(flags)


def all_zero(flags: Sequence[bool | None]) -> bool:
    """Sums are zero where all terms are."""
    return all(flags)


def never_zero(flags: Sequence[bool | None]) -> bool:
    return False


@dataclass(frozen=True)
class Operation:
    """One call: ``out = func(*args, **kwargs)``."""

    name: str
    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    out: Any
    where: str

    @property
    def reason(self) -> str:
        return f"{self.name} in {self.where}"

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    @property
    def first_out(self) -> Tensor:
        return self.out[0] if isinstance(self.out, (tuple, list)) else self.out


@dataclass(frozen=True)
class Split:
    """A view that cut one removable axis into several; ``ids`` varies over them."""

    ids: Tensor
    module: str


@dataclass(frozen=True)
class Part:
    """One of the equal parts that an axis was split into."""

    ids: Tensor
    module: str


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates of one operation: ``constant`` times the number of labels kept."""

    constant: int
    factors: Sequence[Tensor]
    module: str


@dataclass(frozen=True)
class Norm:
    """A normalization over a removable axis. ``kind``: ``layer``, ``group`` or ``rms``."""

    ids: Tensor
    module: str
    kind: str


@dataclass
class Trace:
    """Labels of all tensors alive, and what the operations say about them."""

    coupling: Coupling = field(default_factory=Coupling)
    maps: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    parameters: dict[str, list[tuple[int, Tensor]]] = field(default_factory=dict)
    """name -> (axis, labels) of a parameter or buffer"""
    splits: list[Split] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)
    heads: list[Tensor] = field(default_factory=list)
    shared_heads: list[Tensor] = field(default_factory=list)
    modes: dict[str, str] = field(default_factory=dict)
    """module -> ``whole`` or ``within``: what is removed from grouped convolutions and GroupNorm"""
    unknown: dict[str, str] = field(default_factory=dict)
    used: set[int] = field(default_factory=set)
    """identities of the tensors that some operation read"""
    stack: list[tuple[str, nn.Module]] = field(default_factory=list)

    @property
    def module(self) -> nn.Module:
        return self.stack[-1][1]

    @property
    def where(self) -> str:
        return self.stack[-1][0] if self.stack else ""

    def labelled(self, t: Any) -> Labelled:
        return Labelled(tuple(t.shape), self.maps.get(t, ()))

    def put(self, t: Tensor, maps: Sequence[LabelMap]) -> None:
        maps = [m for m in maps if m.ids.numel() > 1]
        if maps:
            self.maps[t] = maps
        else:
            self.maps.pop(t, None)

    def fix(self, m: LabelMap, dims: Sequence[int], reason: str) -> LabelMap | None:
        """Nothing may be removed along these axes; None if the map varied over no other."""
        ids = m.ids
        for d in dims:
            if ids.shape[d] > 1:
                first = ids.narrow(d, 0, 1)
                self.coupling.unite(first, ids, reason)
                ids = first
        if ids.numel() > 1:
            return replace(m, ids=ids)
        self.coupling.freeze(m.ids, reason)
        return None

    def fixed(self, maps: Sequence[LabelMap], dims: Sequence[int], reason: str) -> list[LabelMap]:
        """The maps, with `fix` for those that vary along one of the axes."""
        results = [self.fix(m, dims, reason) if any(map(m.along, dims)) else m for m in maps]
        return [m for m in results if m is not None]

    def freeze(self, maps: Sequence[LabelMap], reason: str) -> None:
        for m in maps:
            self.coupling.freeze(m.ids, reason)

    def combine(
        self, operands: Sequence[Labelled], shape: Shape, rule: ZeroRule, reason: str
    ) -> list[LabelMap]:
        """Maps of what an elementwise operation makes of broadcastable operands."""
        aligned = [operand.aligned(len(shape)) for operand in operands]
        for d, size in enumerate(shape):
            owners = [o for o in aligned if o.shape[d] > 1] if size > 1 else []
            bare = [o for o in owners if not any(m.along(d) for m in o.maps)]
            if bare and len(bare) < len(owners):
                why = f"{reason} meets a tensor of fixed size"
                aligned = [replace(o, maps=self.fixed(o.maps, [d], why)) for o in aligned]
        joined: list[tuple[Tensor, dict[int, bool]]] = []
        for i, operand in enumerate(aligned):
            for m in operand.maps:
                joined = self._joined(joined, m, i, reason)
        count = len(operands)
        return [
            LabelMap(ids, rule([flags.get(i) for i in range(count)])) for ids, flags in joined
        ]

    def _joined(
        self, joined: list[tuple[Tensor, dict[int, bool]]], m: LabelMap, i: int, reason: str
    ) -> list[tuple[Tensor, dict[int, bool]]]:
        """`m`, united with the maps that vary over one of its axes, and the others."""
        ids, flags, rest = m.ids, {i: m.zero}, []
        for other, more in joined:
            shared = [d for d, s in enumerate(ids.shape) if s > 1 and other.shape[d] > 1]
            if not shared:
                rest.append((other, more))
                continue
            self.coupling.unite(other, ids, reason)
            # along an axis that only one of them has, all labels are one now
            ids, other = _narrowed(ids, shared), _narrowed(other, shared)
            ids, flags = torch.maximum(ids, other), {**more, **flags}
        return [*rest, (ids, flags)]


def _narrowed(ids: Tensor, axes: Sequence[int]) -> Tensor:
    for d in range(ids.dim()):
        if d not in axes:
            ids = ids.narrow(d, 0, 1)
    return ids


class Recorder(TorchDispatchMode):
    """Calls the handler of each operation; an unknown one freezes what it touches."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
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
                    trace.freeze(trace.maps.get(t, ()), f"unknown operation {op.reason}")
            else:
                handler(trace, op)
        elif name in ("convolution", "mm", "addmm", "bmm", "baddbmm"):
            handler(trace, Operation(name, func, args, kwargs, out, trace.where or "the model"))  # type: ignore[misc]
        return out


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Register a handler for aten operations; in-place forms (``add_``) follow."""

    def register(handler: Handler) -> Handler:
        for name in names:
            HANDLERS[name] = handler
        return handler

    return register


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
    from prunus.channels import ops  # noqa: F401, PLC0415 (the handlers register themselves)

    trace = Trace()
    label_parameters(trace, model)
    with quiet(model), _module_stack(model, trace), Recorder(trace):
        outputs = run(model, example_inputs)
    for t in output_tensors(outputs):
        trace.freeze(trace.maps.get(t, ()), "it is the model's output")
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
