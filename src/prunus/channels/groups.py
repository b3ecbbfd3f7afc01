"""Groups of units: what can be removed from a model, and what goes with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from prunus.channels.costs import CostModel
from prunus.channels.labels import compact
from prunus.channels.recording import trace_model
from prunus.channels.roles import module_of, role
from prunus.channels.trace import Trace
from prunus.report.tables import Printable

Kind = Literal["channel", "head", "kv_group", "block"]


@dataclass(frozen=True)
class Slot:
    """What the units of a group have in one axis of one parameter or buffer."""

    parameter: str
    dim: int
    index: Tensor
    """(units, width): the positions along the axis that each unit owns"""
    role: str
    """``out`` writes the channel, ``in`` reads it, ``channel`` scales or shifts it, or ``other``"""

    @property
    def module(self) -> str:
        return module_of(self.parameter)


@dataclass(frozen=True)
class Group:
    """Units that are alike: each has the same number of positions in the same parameters."""

    name: str
    kind: Kind
    slots: Sequence[Slot]
    components: Tensor
    """(units,) what the cost model calls them"""
    norms: Mapping[str, str] = field(default_factory=dict)
    """module -> ``layer``, ``group`` or ``rms``: normalizations over this width"""
    min_keep: int = 1

    @property
    def size(self) -> int:
        return len(self.components)

    @property
    def exact(self) -> bool:
        """Whether the smaller model computes what the model with masked units does.

        Over a LayerNorm or a GroupNorm it does not: what stays is normalized by itself.
        """
        return not set(self.norms.values()) - {"rms"}

    @property
    def width(self) -> int:
        """Positions of one unit where it is written."""
        writers = [s for s in self.slots if s.role == "out"] or list(self.slots)
        return min(s.index.shape[1] for s in writers)

    @property
    def modules(self) -> list[str]:
        return list(dict.fromkeys(slot.module for slot in self.slots))

    @property
    def writers(self) -> list[str]:
        """Modules that write the channels: what ``layers=`` chooses by."""
        found = dict.fromkeys(s.module for s in self.slots if s.role == "out")
        return list(found) or self.modules

    def multiple(self, round_to: int) -> int:
        """In units, so that the width that stays is a multiple of `round_to` where it can be."""
        return int(np.lcm(self.width, round_to)) // self.width


@dataclass(frozen=True)
class Channels(Printable):
    """What `channels` found: groups of units, what is refused and why, and what things cost."""

    groups: Sequence[Group]
    refused: Mapping[str, str]
    """the module that writes the channels -> the reason why none of them can go"""
    costs: CostModel
    trace: Trace = field(repr=False)
    components: Tensor = field(repr=False)

    title = "what can be removed"

    def __getitem__(self, name: str) -> Group:
        return next(group for group in self.groups if group.name == name)

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def of(self, module: str) -> list[Group]:
        """The groups with a slot in this module."""
        return [group for group in self.groups if module in group.modules]

    def header(self) -> Sequence[str]:
        return ("group", "kind", "units", "width", "exact", "tensors")

    def cells(self) -> Iterable[Sequence[str]]:
        for g in self.groups:
            exact = "yes" if g.exact else f"no: {', '.join(sorted(set(g.norms.values())))} norm"
            yield g.name, g.kind, str(g.size), str(g.width), exact, str(len(g.slots))

    def notes(self) -> Sequence[str]:
        partly = {name for group in self.groups for name in group.writers}
        lines = [
            f"stays {'in part' if name in partly else 'whole'}: {name}: {reason}"
            for name, reason in self.refused.items()
        ]
        return lines + [f"unknown operation: {n} in {w}" for n, w in self.trace.unknown.items()]


def channels(model: nn.Module, example_inputs: object) -> Channels:
    """Find which slices of which parameters of `model` must go together.

    The model is run once, in evaluation mode, on ``example_inputs``: a tensor, a tuple of
    positional arguments or a mapping of keyword arguments. Labels of the parameters' slices are
    pushed through the operations that happen; one that is not known keeps whatever it touches.

    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> [(g.name, g.size) for g in prunus.channels(net, torch.zeros(1, 4))]
    [('0', 8)]
    """
    trace = trace_model(model, example_inputs)
    components = _with_splits(trace)
    reasons = trace.coupling.reasons(components)
    slots = _slots(trace, model, components)
    groups, refused = _grouped(trace, slots, components, reasons)
    return Channels(groups, refused, CostModel.of(trace, model, components), trace, components)


def _with_splits(trace: Trace) -> Tensor:
    """Components for which every view that cuts an axis stays a box.

    Where a choice is left, the longest of the parts stays free: channels of a shuffle, not its
    groups.
    """
    while True:
        components = trace.coupling.components()
        before = len(trace.coupling.edges)
        for split in trace.splits:
            found = compact(components[split.ids.long()])
            axes = [d for d, size in enumerate(found.shape) if size > 1]
            if len(axes) > 1:
                free = max(axes, key=lambda d: (found.shape[d], d))
                _tie_across(trace, split.ids, [d for d in axes if d != free], split.module)
        if len(trace.coupling.edges) == before:
            return components


def _tie_across(trace: Trace, ids: Tensor, dims: Sequence[int], module: str) -> None:
    for d in dims:
        trace.coupling.unite(ids.narrow(d, 0, 1), ids, f"a view in {module}")
        ids = ids.narrow(d, 0, 1)


def _slots(
    trace: Trace, model: nn.Module, components: Tensor
) -> list[tuple[str, int, str, Tensor]]:
    """Parameter, axis, role and (size,) components of every labelled axis."""
    return [
        (name, dim, role(model, name, dim), components[ids.long()])
        for name, axes in trace.parameters.items()
        for dim, ids in axes
    ]


def _signatures(slots: Sequence[tuple[str, int, str, Tensor]], count: int) -> np.ndarray:
    """(count,) a number for each component that says how many positions it has in which axis."""
    random = np.random.default_rng(0)
    total = np.zeros(count, np.uint64)
    for *_, found in slots:
        factor = random.integers(1, 1 << 63, dtype=np.uint64)
        total += factor * np.bincount(found.numpy(), minlength=count).astype(np.uint64)
    return total


def _grouped(
    trace: Trace,
    slots: Sequence[tuple[str, int, str, Tensor]],
    components: Tensor,
    reasons: Mapping[int, str],
) -> tuple[list[Group], dict[str, str]]:
    count = int(components.max()) + 1
    signatures = _signatures(slots, count)
    kinds = _kinds(trace, components)
    norms = _norms(trace, components, count)
    members: dict[int, list[int]] = {}
    for component in dict.fromkeys(np.concatenate([s[3].numpy() for s in slots]).tolist()):
        members.setdefault(int(signatures[component]), []).append(component)
    refused: dict[str, str] = {}
    offered: list[list[int]] = []
    for units in members.values():
        frozen = next((reasons[u] for u in units if u in reasons), None)
        free = [u for u in units if u not in reasons]
        if frozen:
            _refuse(refused, slots, units, frozen)
        if len(free) > 1:
            offered.append(free)
        elif free:
            _refuse(refused, slots, free, "it is a single unit")
    groups: list[Group] = []
    for units, found in zip(offered, _slots_of(slots, offered, count), strict=True):
        groups.append(_group(found, torch.tensor(units), kinds, norms, {g.name for g in groups}))
    return groups, refused


def _slots_of(
    slots: Sequence[tuple[str, int, str, Tensor]], groups: Sequence[Sequence[int]], count: int
) -> list[list[Slot]]:
    """The slots of each of the groups, which are lists of components."""
    owner, order = torch.full((count,), -1), torch.zeros(count, dtype=torch.long)
    for i, units in enumerate(groups):
        owner[torch.tensor(units)] = i
        order[torch.tensor(units)] = torch.arange(len(units))
    found: list[list[Slot]] = [[] for _ in groups]
    for name, dim, what, components in slots:
        owners = owner[components]
        for i in torch.unique(owners[owners >= 0]).tolist():
            here = (owners == i).nonzero().flatten()
            unit = order[components[here]]
            index = here[torch.argsort(unit, stable=True)].view(len(groups[i]), -1)
            found[i].append(Slot(name, dim, index, what))
    return found


def _refuse(
    refused: dict[str, str],
    slots: Sequence[tuple[str, int, str, Tensor]],
    units: Sequence[int],
    reason: str,
) -> None:
    wanted = torch.tensor(units)
    for name, _, what, found in slots:
        if what == "out" and bool(torch.isin(found, wanted).any()):
            refused.setdefault(module_of(name), reason)


def _kinds(trace: Trace, components: Tensor) -> dict[int, Kind]:
    kinds: dict[int, Kind] = {}
    named: tuple[tuple[Kind, list[Tensor]], ...] = (
        ("head", trace.heads),
        ("kv_group", trace.shared_heads),
    )
    for kind, found in named:
        for ids in found:
            kinds.update(dict.fromkeys(torch.unique(components[ids.long()]).tolist(), kind))
    return kinds


def _norms(trace: Trace, components: Tensor, count: int) -> list[tuple[str, str, Tensor]]:
    """Module, kind and (count,) whether the component is in the width it normalizes over."""
    found = []
    for norm in trace.norms:
        inside = torch.zeros(count, dtype=torch.bool)
        inside[components[norm.ids.long()]] = True
        found.append((norm.module, norm.kind, inside))
    return found


def _group(
    slots: Sequence[Slot],
    units: Tensor,
    kinds: Mapping[int, Kind],
    norms: Sequence[tuple[str, str, Tensor]],
    names: set[str],
) -> Group:
    inside = {module: kind for module, kind, mask in norms if bool(mask[units].any())}
    kind = kinds.get(int(units[0]), "channel")
    base = Group("", kind, slots, units, inside).writers[0] or "model"
    name, n = base, 2
    while name in names:
        name, n = f"{base}#{n}", n + 1
    return Group(name, kind, slots, units, inside)
