"""What a block is called with and returns: the stream, and what goes beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class BlockError(ValueError):
    """Why the blocks cannot be run one by one."""

    def __init__(self, message: str) -> None:
        self.why = f"sequential: {message}"
        super().__init__(f"{self.why}; prune all at once, or name another list of blocks")


class RepeatedBlockError(BlockError):
    """Blocks with shared weights, as ALBERT's: what they are given cannot be told by position."""


def _place(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | str:
    """Where in a block's arguments the stream is."""
    if args and isinstance(args[0], Tensor):
        return 0
    if isinstance(kwargs.get("hidden_states"), Tensor):
        return "hidden_states"
    raise BlockError("a block is called without a tensor in front")


def without_stream(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Arguments]:
    place = _place(args, kwargs)
    # a cache would grow with each pass
    caches = {key: None for key, x in kwargs.items() if type(x).__name__.endswith("Cache")}
    if place == 0:
        return args[0], ((None, *args[1:]), {**kwargs, **caches})
    return kwargs[str(place)], (args, {**kwargs, **caches, str(place): None})


def with_stream(stream: Tensor, arguments: Arguments) -> Arguments:
    args, kwargs = arguments
    if args and args[0] is None:
        return (stream, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": stream}


def stream_of(output: Any) -> Tensor:
    stream = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(stream, Tensor):
        raise BlockError(f"a block returns {type(stream).__name__}, not a tensor")
    return stream


def returns_more(output: Any) -> bool:
    return isinstance(output, tuple | list) and any(x is not None for x in output[1:])


def beside(output: Any) -> list[Tensor | None]:
    """The tensors that a block returns beside the stream, None for anything else."""
    others = output[1:] if isinstance(output, tuple | list) else ()
    return [x if isinstance(x, Tensor) else None for x in others]


def in_form_of(output: Any, stream: Tensor) -> Any:
    """The stream in the form of a block's output."""
    if not isinstance(output, tuple | list):
        return stream
    items = [stream, *output[1:]]
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
