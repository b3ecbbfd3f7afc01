"""Chains of layers through which nothing passes any more although each of them has weights.

Looked for in `nn.Sequential`, whose order of computing is known without running it: where a layer
reads only what the ones before no longer write.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunus.core.names import few
from prunus.core.wrappers import clean_name, is_sharded, unwrap

_BY_CHANNEL = ("activation", "batchnorm", "dropout", "pooling", "linear")
_MIXING = (nn.MultiheadAttention, nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d, nn.GLU)


def cut_message(names: Sequence[str]) -> str:
    """What a person should know of layers at which a path ends."""
    return (
        f"cut: nothing passes {few(names)}, because all that is read there is no longer written by "
        "the layers before; lower the sparsity, exclude layers, or use an allocator such as "
        "'uniform' or 'erk'"
    )


def cut_paths(model: nn.Module) -> list[str]:
    """The layers, not empty themselves, behind which nothing of the input is left.

    Of each `nn.Sequential` the first. What stands between layers is followed where it works channel
    by channel; behind anything else all channels count as written.

    >>> from prunus.core.cut_paths import cut_paths
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    >>> with torch.no_grad():
    ...     model[0].weight[0], model[2].weight[0, 1] = 0, 0
    >>> cut_paths(model)
    ['2']
    """
    found, inner = [], set[nn.Module]()
    for name, module in unwrap(model).named_modules():
        if _is_chain(module) and module not in inner:
            chain = list(_flat(name, module))
            inner.update(m for m in module.modules() if _is_chain(m))
            found += _first_cut(chain)
    return found


def _is_chain(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _flat(name: str, chain: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for key, module in chain.named_children():
        full = f"{name}.{key}" if name else key
        if _is_chain(module):
            yield from _flat(full, module)
        else:
            yield full, module


@torch.no_grad()
def _first_cut(chain: Sequence[tuple[str, nn.Module]]) -> list[str]:
    written: Tensor | None = None  # which channels depend on the input; None: all
    for name, module in chain:
        if (reads := _connections(module)) is not None:
            written = _spread(written, reads.shape[1])
            if written is not None:
                reads = reads & written.to(reads.device)
            now = reads.any(1)
            if not now.any():
                return [clean_name(name)] if written is not None and _has_weights(module) else []
            written = now
        elif not _keeps_channels(module) and not isinstance(module, nn.Flatten):
            written = None
    return []


def _connections(module: nn.Module) -> Tensor | None:
    """(outputs, inputs) where there are weights; None for what is no plain layer."""
    plain = type(module) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    weight: Any = getattr(module, "weight", None)
    usable = isinstance(weight, nn.Parameter) and not is_sharded(weight) and not weight.is_meta
    if not plain or not usable or getattr(module, "groups", 1) != 1 or not weight.numel():
        return None
    there: Tensor = weight != 0
    return there.flatten(2).any(2) if there.dim() > 2 else there


def _spread(written: Tensor | None, inputs: int) -> Tensor | None:
    """The channels as the inputs of the next layer, which may be flattened pictures of them."""
    if written is None or inputs % len(written):
        return None
    return written.repeat_interleave(inputs // len(written))


def _has_weights(module: nn.Module) -> bool:
    weight: Any = module.weight
    return bool(weight.any())


def _keeps_channels(module: nn.Module) -> bool:
    kinds = tuple(f"torch.nn.modules.{kind}" for kind in _BY_CHANNEL)
    known = type(module).__module__ in kinds and not isinstance(module, (*_MIXING, nn.Linear))
    return known and not isinstance(module, nn.Bilinear)
