"""An error that names what could not be made smaller."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from prunus.channels.groups import Channels
from prunus.channels.verify import difference, outputs


def check_same(
    model: nn.Module,
    expected: Sequence[Sequence[Tensor]],
    inputs: Sequence[Any],
    found: Channels,
    gone: Mapping[str, Sequence[int]],
) -> None:
    """Raises ValueError, naming module and operation, unless the outputs are as expected."""
    try:
        reason = difference(expected, outputs(model, inputs))
    except (RuntimeError, ValueError, IndexError, AssertionError, TypeError) as error:
        place = failing_module(model, inputs)
        near = [name for name in gone if name.startswith(place.rpartition(".")[0] or place)]
        raise ValueError(
            f"{place or 'the model'} cannot be made smaller: {error}; its code has a size of its "
            f"own. Nothing was changed; exclude {', '.join(map(repr, near[:3])) or 'it'}"
        ) from error
    if reason:
        inexact = [name for name in gone if not found[name].exact]
        hint = f"; exclude one of {', '.join(list(gone)[:5])}" if not inexact else ""
        raise ValueError(
            f"the smaller model computes something else: {reason}; nothing was changed{hint}"
        )


def failing_module(model: nn.Module, inputs: Sequence[Any]) -> str:
    """The innermost module that raises an error."""
    stack: list[str] = []
    with _entered(model, stack):
        try:
            outputs(model, inputs)
        except Exception:
            return stack[-1] if stack else ""
    return ""


@contextlib.contextmanager
def _entered(model: nn.Module, stack: list[str]) -> Iterator[None]:
    """While in force, ``stack`` holds the names of the modules that are running."""

    def push(name: str, module: nn.Module, args: Any) -> None:
        stack.append(name)

    def pop(module: nn.Module, args: Any, output: Any) -> None:
        stack.pop()

    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.callback(module.register_forward_pre_hook(partial(push, name)).remove)
            hooks.callback(module.register_forward_hook(pop).remove)
        yield
