"""How a model runs while its blocks are recorded: uncached, as written, around stand-ins."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Language models must not remember keys and values from one forward pass to the next."""
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = [config for config in found if hasattr(config, "use_cache")]
    saved = [config.use_cache for config in configs]
    for config in configs:
        config.use_cache = False
    try:
        yield
    finally:
        for config, value in zip(configs, saved, strict=True):
            config.use_cache = value


@contextlib.contextmanager
def stand_in(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Lets a function stand in for a module's forward, which may be a wrapper of its own."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@contextlib.contextmanager
def eager(module: nn.Module) -> Iterator[None]:
    """Compiled modules run as they were written, so that hooks and stand-ins are called."""
    compiled = any(
        getattr(m, "_compiled_call_impl", None) is not None or "_orig_mod" in m._modules
        for m in module.modules()
    )
    if not compiled:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
