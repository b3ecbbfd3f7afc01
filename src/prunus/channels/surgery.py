"""Removing units from a live model: tensors are cut, attributes follow, all of it can be undone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prunus.channels.attributes import (
    HEADS,
    OWN,
    PARTS,
    RMS_EPS,
    SHAPES,
    TOTALS,
    WIDTHS,
    has_offset_weight,
)
from prunus.channels.groups import Channels
from prunus.channels.labels import compact
from prunus.channels.roles import inputs_first


@dataclass
class Change:
    """What was replaced, so that it can be put back."""

    tensors: list[tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=list)
    attributes: list[tuple[Any, str, Any]] = field(default_factory=list)

    def data(self, t: Tensor, new: Tensor, grad: Tensor | None = None) -> None:
        self.tensors.append((t, t.data, t.grad))
        t.grad = None
        t.data = new
        t.grad = grad

    def attribute(self, owner: Any, name: str, value: Any) -> None:
        if getattr(owner, name) != value:
            self.attributes.append((owner, name, getattr(owner, name)))
            setattr(owner, name, value)

    def attributes_by_module(self, model: nn.Module) -> dict[str, dict[str, Any]]:
        """Module -> attribute -> value now, of all that changed; the config is ``config``."""
        names = {id(module): name for name, module in model.named_modules()}
        names[id(getattr(model, "config", None))] = "config"
        found: dict[str, dict[str, Any]] = {}
        for owner, attribute, _ in self.attributes:
            if id(owner) in names:
                found.setdefault(names[id(owner)], {})[attribute] = getattr(owner, attribute)
        return found

    def undo(self) -> None:
        for t, data, grad in reversed(self.tensors):
            t.grad = None
            t.data = data
            t.grad = grad
        for owner, name, value in reversed(self.attributes):
            setattr(owner, name, value)
        self.tensors.clear()
        self.attributes.clear()


def gone_mask(found: Channels, gone: Mapping[str, Iterable[int]]) -> Tensor:
    """(components,) whether a component goes; ``gone`` maps groups to numbers of units."""
    mask = found.costs.nothing_gone()
    for name, units in gone.items():
        mask[found[name].components[torch.as_tensor(list(units), dtype=torch.long)]] = True
    return mask


def kept_positions(found: Channels, gone: Tensor) -> dict[str, dict[int, Tensor]]:
    """Parameter or buffer -> axis -> (size,) what is kept, for those that lose anything."""
    kept: dict[str, dict[int, Tensor]] = {}
    for name, axes in found.trace.parameters.items():
        for dim, ids in axes:
            keep = ~gone[found.components[ids.long()]]
            if not keep.all():
                kept.setdefault(name, {})[dim] = keep
    return kept


def masks(found: Channels, gone: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """Keep-masks, broadcastable to each parameter and buffer that the units have a part in.

    A running variance has none: it stays what it is, since zero would divide by nothing. This is
    what a training pattern multiplies into the weights after each step.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    results = {}
    for name, axes in kept_positions(found, gone).items():
        if name.endswith("running_var"):
            continue
        t = tensors[name]
        mask = torch.ones((1,) * t.dim(), dtype=torch.bool)
        for dim, keep in axes.items():
            mask = mask & keep.view([-1 if d == dim else 1 for d in range(t.dim())])
        results[name] = mask.to(t.device)
    return results


def cut(model: nn.Module, found: Channels, gone: Tensor, change: Change) -> None:
    """Remove the components from every tensor, and let modules know."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {name: tuple(t.shape) for name, t in tensors.items()}
    kept = kept_positions(found, gone)
    for name, axes in kept.items():
        t = tensors[name]
        change.data(t, select(t.data, axes), None if t.grad is None else select(t.grad, axes))
    _follow_splits(model, found, gone, change)
    _follow_parts(model, found, gone, change)
    for name in {parameter.rpartition(".")[0] for parameter in kept}:
        owner, prefix = model.get_submodule(name), f"{name}." if name else ""
        _follow_shapes(owner, found.trace.modes.get(name), change)
        own = {n: before[prefix + n] for n, _ in owner.named_parameters(recurse=False)}
        _follow_shape_attributes(owner, own, change)
    for module, kind in {n.module: n.kind for n in found.trace.norms}.items():
        if kind == "rms" and f"{module}.weight" in kept:
            old = before[f"{module}.weight"][-1]
            _correct_rms(model.get_submodule(module), old, change)


def select(t: Tensor, axes: Mapping[int, Tensor]) -> Tensor:
    """The kept positions of `t`, contiguous."""
    for dim, keep in axes.items():
        t = t.index_select(dim, keep.nonzero().flatten().to(t.device))
    return t.contiguous()


def _follow_shapes(module: nn.Module, mode: str | None, change: Change) -> None:
    """Attributes of torch's own modules, and of transformers' Conv1D."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            change.attribute(module, "num_features", len(module.running_mean))
        return
    shape = tuple(weight.shape)
    if isinstance(module, nn.modules.conv._ConvNd):
        _follow_convolution(module, shape, mode, change)
    elif isinstance(module, nn.Linear):
        change.attribute(module, "out_features", shape[0])
        change.attribute(module, "in_features", shape[1])
    elif inputs_first(module):
        change.attribute(module, "nx", shape[0])
        change.attribute(module, "nf", shape[1])
    elif isinstance(module, nn.Embedding):
        change.attribute(module, "embedding_dim", shape[1])
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        change.attribute(module, "num_features", shape[0])
    elif isinstance(module, nn.GroupNorm):
        if mode == "whole":
            per = module.num_channels // module.num_groups
            change.attribute(module, "num_groups", shape[0] // per)
        change.attribute(module, "num_channels", shape[0])
    elif isinstance(getattr(module, "normalized_shape", None), tuple):
        change.attribute(module, "normalized_shape", shape)


def _follow_shape_attributes(
    module: nn.Module, sizes: Mapping[str, tuple[int, ...]], change: Change
) -> None:
    """A parameter that is viewed in a shape which the module keeps, such as ``(channels, 1, 1)``.

    ``sizes`` are the shapes of the module's own parameters before they were cut.
    """
    changed = {
        old: now
        for name, p in module.named_parameters(recurse=False)
        for old, now in zip(sizes[name], p.shape, strict=True)
        if old != now
    }
    for attribute in SHAPES:
        shape = vars(module).get(attribute)
        if isinstance(shape, tuple):
            new = list(shape)
            for old, now in changed.items():
                if old in new:  # of equal sizes the last: channels come after positions
                    new[len(new) - 1 - new[::-1].index(old)] = now
            change.attribute(module, attribute, tuple(new))
    for attribute in OWN:
        value = vars(module).get(attribute)
        if type(value) is int and value in changed:
            change.attribute(module, attribute, changed[value])


def _follow_parts(model: nn.Module, found: Channels, gone: Tensor, change: Change) -> None:
    """Modules that split an axis into parts of a length they state."""
    seen: set[tuple[str, str]] = set()
    for part in found.trace.parts:
        lost = int(gone[found.components[part.ids.long()]].sum())
        module, old = model.get_submodule(part.module), part.ids.numel()
        for attribute in PARTS if lost else ():
            value = vars(module).get(attribute)
            if type(value) is int and value == old and (part.module, attribute) not in seen:
                seen.add((part.module, attribute))
                change.attribute(module, attribute, old - lost)


def _follow_convolution(
    module: Any, shape: tuple[int, ...], mode: str | None, change: Change
) -> None:
    transposed, groups = module.transposed, module.groups
    if mode == "whole":
        long = module.in_channels if transposed else module.out_channels
        groups = shape[0] // (long // groups)
    first, second = shape[0], shape[1] * groups
    change.attribute(module, "groups", groups)
    change.attribute(module, "out_channels", second if transposed else first)
    change.attribute(module, "in_channels", first if transposed else second)


def _follow_splits(model: nn.Module, found: Channels, gone: Tensor, change: Change) -> None:
    """Modules that cut an axis into heads by numbers of their own have fewer heads now."""
    seen: set[tuple[str, str]] = set()
    for split in found.trace.splits:
        components = compact(found.components[split.ids.long()])
        axes = [d for d, size in enumerate(components.shape) if size > 1]
        lost = gone[components]
        if len(axes) != 1 or not lost.any():
            continue
        old = components.shape[axes[0]]
        new = old - int(lost.sum())
        width = split.ids.numel() // max(1, _thirds(split.ids, axes[0]))
        _follow_heads(
            model.get_submodule(split.module), split.module, (old, new, width), seen, change
        )


def _thirds(ids: Tensor, free: int) -> int:
    """How many tensors are fused in front of the axis of heads."""
    front = [size for size in ids.shape[:free] if size > 1]
    return front[-1] if front else 1


def _follow_heads(
    module: nn.Module,
    name: str,
    sizes: tuple[int, int, int],
    seen: set[tuple[str, str]],
    change: Change,
) -> None:
    old, new, width = sizes
    for attribute, value in list(vars(module).items()):
        if (name, attribute) in seen or isinstance(value, bool) or not isinstance(value, int):
            continue
        if attribute in HEADS and value == old:
            seen.add((name, attribute))
            change.attribute(module, attribute, new)
        elif attribute in WIDTHS and value == width:
            seen.add((name, attribute))
            change.attribute(module, attribute, width // old * new)
        elif attribute in TOTALS and value % old == 0:
            seen.add((name, attribute))
            change.attribute(module, attribute, value // old * new)


def _correct_rms(module: Any, old: int, change: Change) -> None:
    """Of C channels C' are left: the masked mean square is C' / C of theirs."""
    weight: Tensor = module.weight
    new = weight.shape[-1]
    factor = (old / new) ** 0.5
    scaled = weight.data * factor
    if has_offset_weight(module):
        scaled = (weight.data + 1) * factor - 1
    change.data(weight, scaled, weight.grad)
    for attribute in RMS_EPS:
        eps = getattr(module, attribute, None)
        if isinstance(eps, float):
            change.attribute(module, attribute, eps * old / new)
