"""Hooks on the steps of an optimizer, which may be wrapped in others or wrap one itself."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from prunus.modifiers.optimizer_state import wrapped_optimizers

log = logging.getLogger("prunus")
Before = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
HANDLES = ("accelerate", "lightning", "lightning_fabric", "pytorch_lightning")
"""packages whose wrappers pass a call of `step` on, or leave it out, and change nothing after it"""


def innermost(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that steps, inside Accelerate's and Lightning's handles.

    Not inside one that goes on with the weights once the inner one has stepped (Lookahead).
    """
    inner = getattr(optimizer, "optimizer", None)
    known = type(optimizer).__module__.partition(".")[0] in HANDLES
    if isinstance(inner, torch.optim.Optimizer) and (
        known or not isinstance(optimizer, torch.optim.Optimizer)
    ):
        return innermost(inner)
    if not isinstance(optimizer, torch.optim.Optimizer):
        kind = type(optimizer).__name__
        raise ValueError(f"attach needs a torch.optim.Optimizer to hook, not {kind}")
    # without Optimizer.__init__ (Lookahead) nobody has, and hooks are never called
    for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        optimizer.__dict__.setdefault(name, OrderedDict())
    optimizer._patch_step_function()
    return optimizer


class StepHooks:
    """Calls ``before`` and ``after`` around each step, and says whether it really was one.

    A wrapper that steps its inner optimizer at some calls only is asked by way of that one.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, before: Before, after: Callable[..., None]
    ) -> None:
        plain: Any = torch.compiler.disable  # a compiled step leaves its graph for our hooks
        self._before, self._after = before, after
        self._within = self._told = False
        self.inner = [each for each in wrapped_optimizers(optimizer) if each is not optimizer]
        self.stepped = True
        self.handles = [
            optimizer.register_step_pre_hook(plain(self._begin)),
            optimizer.register_step_post_hook(plain(self._end)),
        ]
        for each in self.inner:
            innermost(each)
            self.handles.append(each.register_step_post_hook(plain(self._note)))

    def _begin(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.stepped, self._within = not self.inner, True
        return self._before(optimizer, args, kwargs)

    def _end(self, *args: Any) -> None:
        self._within = False
        self._after(*args)

    def _note(self, inner: torch.optim.Optimizer, *_: Any) -> None:
        self.stepped = True
        if not (self._within or self._told):
            self._told = True
            log.warning(
                "%s has stepped outside of step() of the optimizer that was attached, which then "
                "neither counts nor masks; attach the one that your loop steps",
                type(inner).__name__,
            )

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
