"""What every statistic has in common, and the registry of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from prunus.core.extension import Extensible, complete
from prunus.core.names import Registry
from prunus.core.ranks import Ranks, all_ranks

READS = ("inputs", "gradients")
NEEDS = ("reads", "by_rows", "update", "tensors")
Samples = Literal["micro_batch", "example"]
SAMPLES = ("micro_batch", "example")


@dataclass(frozen=True)
class Sampling:
    """How many gradients to take, each of a whole calibration batch or of one example of it.

    >>> prunus.Sampling(num_grads=256, samples="example")
    Sampling(num_grads=256, samples='example')
    """

    num_grads: int
    samples: Samples = "micro_batch"


class Statistic(Extensible):
    """Something summed over calibration data for one layer.

    A sum, so that data-parallel ranks add up: `tensors` are what one all-reduce makes whole.

    >>> class InputMax(prunus.Statistic):
    ...     def __init__(self, columns):
    ...         self.sums = torch.zeros(columns)
    ...     def update(self, x):
    ...         self.sums += x.abs().amax(0)
    ...     def tensors(self):
    ...         return [self.sums]
    >>> stat = InputMax(2)
    >>> stat.update(torch.tensor([[1.0, -5.0], [2.0, 3.0]]))
    >>> stat.sums, stat.reads, stat.nbytes
    (tensor([2., 5.]), 'inputs', 8)
    """

    PARTS: ClassVar[tuple[str, ...]] = ("reads", "by_rows", "update", "tensors", "nbytes")

    name: ClassVar[str]
    """what `prunus list` calls it, once registered"""
    reads: Literal["inputs", "gradients"] = "inputs"
    """what `update` takes in"""
    by_rows: bool = False
    """whether each row of the layer has numbers of its own, so that rows can be shared out; for
    those that read gradients"""
    sampling: Sampling | None = None
    """of those that read gradients: how many, and of what; the same for all layers"""
    device: str | None = None
    """where it is held, if that was said; whose free memory then counts"""

    @abstractmethod
    def update(self, t: Tensor) -> None:
        """Take in inputs as (samples, columns), or gradients as (samples, rows, columns).

        Columns are those of the layer's matrix.
        """

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """The sums, in place: they are zeroed, and added up over ranks."""

    @property
    def nbytes(self) -> int:
        """Bytes it holds, known before any data has been seen."""
        return sum(t.nbytes for t in self.tensors())

    @property
    def norm(self) -> Tensor | None:
        """(columns,) the l2 norm of each input column, if it can tell."""
        return None

    def gram(self, device: torch.device | str) -> Tensor | None:
        """(columns, columns) ``X^T X`` of the inputs on this device, if it can tell.

        Errors of the layer's outputs are computed and reported by it.
        """
        return None

    def shortage(self) -> str:
        """What it has seen too little of, as ``8 tokens for 64 columns``; empty if enough."""
        return ""

    def with_rows(self, rows: int) -> Statistic:
        """An empty one with the same settings for another number of rows: for `by_rows`."""
        raise NotImplementedError

    def permute(self, perm: Tensor) -> None:
        """Follow the layer's columns, of which the i-th is now what ``perm[i]`` was.

        One that cannot is measured again.
        """
        raise NotImplementedError

    @property
    def can_permute(self) -> bool:
        return type(self).permute is not Statistic.permute

    def align(self, ranks: Ranks) -> None:
        """Before sums over ranks: agree on what they are counted in. Every rank calls it."""

    def forget(self) -> None:
        """Free what can be computed again from `tensors`."""


STATISTICS: Registry[Statistic] = Registry("statistic", Statistic, ("name", *NEEDS))
_S = TypeVar("_S", bound=Statistic)


def register_statistic(cls: type[_S]) -> type[_S]:
    """Class decorator: make a statistic known by its ``name`` to the command line.

    It derives from `Statistic`. Raises ValueError if the class lacks a part, or takes the name of
    another one.

    >>> @prunus.register_statistic
    ... class Count(prunus.Statistic):
    ...     name = "example_count"
    ...     def __init__(self):
    ...         self.count = torch.zeros(1)
    ...     def update(self, x):
    ...         self.count += len(x)
    ...     def tensors(self):
    ...         return [self.count]
    >>> isinstance(Count(), prunus.Statistic)
    True
    """
    STATISTICS.add(getattr(cls, "name", ""), cls)
    return cls


def checked_statistic(stat: Any) -> Statistic:
    """What a pruner or an allocator wants to measure, registered or not.

    Raises ValueError that names the class, unless it is whole.
    """
    if isinstance(stat, type):
        raise ValueError(f"statistic {stat.__name__} is a class; give one made of it, for a layer")
    cls = type(stat)
    complete(cls, Statistic, "statistic", NEEDS, stat)
    assert isinstance(stat, Statistic)
    wrong = ""
    if stat.reads not in READS:
        wrong = f"reads is {stat.reads!r}; write 'inputs' or 'gradients'"
    elif stat.reads == "gradients" and not isinstance(stat.sampling, Sampling):
        wrong = "it reads gradients; say how many, as sampling = prunus.Sampling(num_grads=256)"
    elif stat.by_rows and stat.reads == "inputs":
        wrong = "by_rows is for gradients; all rows of a layer see the same inputs"
    elif stat.by_rows and cls.with_rows is Statistic.with_rows:
        wrong = "it is by_rows; define with_rows(rows), an empty one of so many rows"
    if wrong:
        raise ValueError(f"statistic {cls.__name__}: {wrong}")
    return stat


def take_in(stat: Statistic, t: Tensor, name: str) -> None:
    """Update with what a layer of this name was given, which may be the model's own tensor.

    Raises ValueError if the statistic writes to it.
    """
    before = 0 if t.is_inference() else t._version
    stat.update(t)
    if before != (0 if t.is_inference() else t._version):
        raise ValueError(
            f"statistic {type(stat).__name__}: update changes what it is given in place, for "
            f"{name}; work on a copy, as of t.clone()"
        )


def all_reduce_statistics(stats: Iterable[Statistic]) -> None:
    """Add statistics up over all data-parallel ranks, in place; shared ones once."""
    everyone = all_ranks()
    for stat in {id(stat): stat for stat in stats}.values() if everyone.group is not None else ():
        stat.align(everyone)
        for tensor in stat.tensors():
            tensor.copy_(everyone.all_reduce(tensor))
