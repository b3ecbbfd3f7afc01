"""The labels of all tensors alive, and what operations do to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from prunus.channels.labels import Coupling, Labelled, LabelMap, Shape

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
        first: Tensor = self.out[0] if isinstance(self.out, (tuple, list)) else self.out
        return first


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

    def of(self, t: Any) -> Sequence[LabelMap]:
        """The maps of a tensor."""
        found: Sequence[LabelMap] = self.maps.get(t, ())  # type: ignore[no-untyped-call]
        return found

    def labelled(self, t: Any) -> Labelled:
        return Labelled(tuple(t.shape), self.of(t))

    def put(self, t: Tensor, maps: Sequence[LabelMap]) -> None:
        maps = [m for m in maps if m.ids.numel() > 1]
        if maps:
            self.maps[t] = maps
        else:
            self.maps.pop(t, None)  # type: ignore[no-untyped-call]

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
        return [LabelMap(ids, rule([flags.get(i) for i in range(count)])) for ids, flags in joined]

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


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Register a handler for aten operations; in-place forms (``add_``) follow."""

    def register(handler: Handler) -> Handler:
        for name in names:
            HANDLERS[name] = handler
        return handler

    return register
