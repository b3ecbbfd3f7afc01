"""Models that cannot be cut as they are, and what to do about it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

_WRAPPERS = {
    "DistributedDataParallel": "pass the module inside, model.module, and wrap it again afterwards",
    "DataParallel": "pass the module inside, model.module",
    "FullyShardedDataParallel": "shrink before you shard",
    "OptimizedModule": "pass the module inside, model._orig_mod, and compile it again afterwards",
}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_shrinkable(model: nn.Module) -> None:
    """Raises ValueError with the remedy for a wrapped, sharded, parametrized or quantized model."""
    for name, module in model.named_modules():
        where = f"{name or 'the model'} ({type(module).__name__})"
        classes = {cls.__name__ for cls in type(module).__mro__}
        for wrapper in classes & set(_WRAPPERS):
            raise ValueError(f"{where} is a wrapper; {_WRAPPERS[wrapper]}")
        if "FSDPModule" in classes:
            raise ValueError(f"{where} is sharded; shrink before fully_shard")
        if parametrize.is_parametrized(module):
            raise ValueError(
                f"{where} is parametrized; call torch.nn.utils.parametrize.remove_parametrizations"
            )
        if any(
            hook.__class__.__module__ == "torch.nn.utils.prune"
            for hook in module._forward_pre_hooks.values()
        ):
            raise ValueError(
                f"{where} is pruned by torch.nn.utils; call torch.nn.utils.prune.remove"
            )
        if "quant" in type(module).__module__ or type(module).__name__.startswith("Linear8bit"):
            raise ValueError(f"{where} is quantized; shrink the model first and quantize it then")
    _check_tensors(model)


def _check_tensors(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if nn.parameter.is_lazy(p):
            raise ValueError(f"{name} has no shape yet; run a batch through the model first")
        if p.is_meta:
            raise ValueError(f"{name} is on the meta device; load weights first")
        if p.dtype not in _FLOATS:
            raise ValueError(f"{name} is {p.dtype} (quantized?); shrink first and quantize then")
        if hasattr(p, "to_local"):
            raise ValueError(f"{name} is sharded over ranks; shrink before you shard")
