"""Looking before each forward pass whether the model is trained or evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from prunus.core.wrappers import unwrap


class _Hook:
    """A hook that copies of the model, and files it is pickled to, do not take along."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.call()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (_nothing,)


def _nothing() -> None:
    pass


class EvalModeHook:
    """Calls ``on_mode(training)`` before each forward pass of a model or of some of its modules.

    A training loop may call any part of the model, so the parts are watched too; but it is the
    model's own mode that counts, because a part kept in evaluation mode (frozen BatchNorm, say)
    must not change weights in the middle of a training pass.
    """

    def __init__(
        self, model: nn.Module, parts: Iterable[nn.Module], on_mode: Callable[[bool], None]
    ) -> None:
        self.root, self.on_mode = unwrap(model), on_mode
        # a compiled model leaves its graph once, for what was attached; not for each part
        plain: Any = torch.compiler.disable
        hooks = {module: _Hook(self._check_inside) for module in (self.root, *parts)}
        hooks[model] = _Hook(plain(self._check))
        # before FSDP2's own hooks, which gather what the weights are by then
        self.handles = [
            module.register_forward_pre_hook(hook, prepend=True) for module, hook in hooks.items()
        ]

    def _check(self) -> None:
        self.on_mode(self.root.training)

    def _check_inside(self) -> None:
        if not torch.compiler.is_compiling():
            self._check()

    def close(self) -> None:
        """Remove the hooks; a second call does nothing."""
        while self.handles:
            self.handles.pop().remove()
