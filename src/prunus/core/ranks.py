"""The ranks of a distributed run: sums over them, and errors that all of them raise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from prunus.solvers import selection

_ALONE = "failed_between_collectives"


@contextmanager
def no_error_sync(when: bool = True) -> Iterator[None]:
    """For a stretch with collectives in it: what fails there is raised without asking the others.

    They are waiting in the next collective and would take the question for a part of that. The
    process that ends by the error ends them too: their launcher or backend sees it gone.
    """
    try:
        yield
    except Exception as error:
        if when:
            setattr(error, _ALONE, True)
        raise


@dataclass(frozen=True)
class Ranks:
    """The ranks among which the rows of the layers are cut; a single one where they are not.

    >>> ranks = prunus.Ranks()
    >>> ranks.all_reduce(torch.ones(2)), ranks.keep_all_but_lowest(torch.tensor([3.0, 1.0, 2.0]), 1)
    (tensor([1., 1.]), tensor([ True, False,  True]))
    """

    group: Any = None
    rank: int = 0
    world_size: int = 1

    def all_reduce(self, t: Tensor) -> Tensor:
        """The sum over the ranks, in the dtype and on the device of `t`."""
        if self.group is None:
            return t
        moved = t.to(self._device(t.device), copy=True).contiguous()
        dist.all_reduce(moved, group=self.group)
        return moved.to(t.device)

    def first(self, value: Any) -> Any:
        """What the first rank gives."""
        values = [value]
        if self.group is not None:
            dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def _device(self, device: torch.device) -> torch.device | str:
        """The device itself, or one that the ranks can talk through."""
        backends = dist.get_backend_config(self.group).split(",")  # "cpu:gloo,cuda:nccl"
        devices = [backend.split(":")[0] for backend in backends]
        return device if device.type in devices else devices[0]

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """One vector for each rank, exchanged for those from each that are as long as the own."""
        sizes = [part.numel() for part in parts]
        device = self._device(parts[0].device)
        sent = torch.cat(list(parts)).to(device)
        got = sent.new_empty(self.world_size * sizes[self.rank])
        dist.all_to_all_single(got, sent, [sizes[self.rank]] * self.world_size, sizes, self.group)
        return list(got.to(parts[0].device).chunk(self.world_size))

    def keep_all_but_lowest(self, scores: Tensor, k: int) -> Tensor:
        """This rank's part of the keep-mask that drops the k lowest scores of all ranks."""
        if self.group is not None:
            k = selection.count_lowest([scores], k, self.all_reduce, self.rank, self.world_size)[0][
                0
            ]
        return selection.keep_all_but_lowest(scores, k)

    def check_same(self, **values: Any) -> None:
        """Raises ValueError, on all ranks, where they were given different values.

        Compares texts, so values need one that says it all. Every rank must call this.
        """
        if self.group is None:
            return
        told: list[Any] = [None] * self.world_size
        dist.all_gather_object(told, {k: str(v) for k, v in values.items()}, group=self.group)
        for name, first in told[0].items():
            for rank, other in enumerate(told):
                if other[name] != first:
                    pairs = zip_longest(first.splitlines(), other[name].splitlines())
                    here, there = next((a, b) for a, b in pairs if a != b)
                    raise ValueError(
                        f"the ranks were given different {name}: rank 0 {_quoted(here)}, rank "
                        f"{rank} {_quoted(there)}; give all of them the same"
                    )

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """What fails on one rank fails on all; the others would wait for it for ever.

        Raises RuntimeError on the ranks that did not fail themselves. What has failed in
        `no_error_sync` is raised on its own rank only.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            if self.group is not None and getattr(caught, _ALONE, False):
                raise
            error = caught
        if self.group is not None:
            messages: list[Any] = [None] * self.world_size
            message = error and f"{type(error).__name__}: {error}"
            dist.all_gather_object(messages, message, group=self.group)
            if error is None and any(messages):
                rank, message = next((r, text) for r, text in enumerate(messages) if text)
                raise RuntimeError(f"rank {rank} failed with {message}")
        if error is not None:
            raise error


PATIENCE = timedelta(minutes=30)
_calls: Counter[str] = Counter()


@contextmanager
def first_rank_tells(what: str, when: bool = True) -> Iterator[None]:
    """For work of the first rank that others may call too: they wait, and learn how it ended.

    The first rank waits for nobody, so it may do the work alone. Raises RuntimeError on the others
    where it failed there, or was not begun for half an hour.
    """
    if not when or all_ranks().group is None:
        yield
        return
    from torch.distributed.distributed_c10d import _get_default_store  # not in every build

    store = _get_default_store()
    _calls[what] += 1
    key, outcome = f"prunus/{_calls[what]}/{what}", ""
    try:
        yield
    except BaseException as error:
        outcome = f"{type(error).__name__}: {error}"
        raise
    finally:
        if all_ranks().rank == 0:
            store.set(key, outcome)
    if all_ranks().rank == 0:
        return
    try:
        store.wait([key], PATIENCE)
    except RuntimeError as error:
        message = f"rank 0 has not done this: {what}; call it on every rank, or on that one only"
        raise RuntimeError(message) from error
    if outcome := store.get(key).decode():
        raise RuntimeError(f"rank 0 failed with {outcome}")


def _quoted(line: str | None) -> str:
    return "nothing more" if line is None else f"'{line.strip()}'"


def row_cuts(rows: int, world_size: int, unit: int = 1) -> list[tuple[int, int]]:
    """Consecutive shares of the rows, as equal as multiples of `unit` allow; late ones may be 0."""
    units = rows // unit
    ends = [units * (rank + 1) // world_size * unit for rank in range(world_size)]
    return list(zip([0, *ends], ends, strict=False))


def lockstep(items: Iterator[Any], shards: Ranks, all_needed: bool) -> Iterator[Any]:
    """The items, as long as any rank has one (None where it has run out), or as long as all have.

    What fails on one rank fails on all.
    """
    while shards.group is not None:
        item, error = None, None
        try:
            item = next(items, None)
        except Exception as caught:
            error = caught
        have, failed = shards.all_reduce(
            torch.tensor([int(item is not None), int(error is not None)])
        ).tolist()
        if failed:
            with shards.raise_on_all_ranks():
                if error is not None:
                    raise error
        if have == 0 or (all_needed and have < shards.world_size):
            return
        yield item
    yield from items


def all_ranks() -> Ranks:
    """Every rank there is, each with data of its own."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return Ranks(dist.group.WORLD, dist.get_rank(), dist.get_world_size())
    return Ranks()
