"""Calibration data, and the passes over it that fill statistics."""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from prunus.calibration.batches import Batch, call_of, to_device
from prunus.calibration.memory_plan import parse_bytes
from prunus.core.ranks import all_ranks, lockstep, no_error_sync
from prunus.core.wrappers import is_sharded, reshard, unwrap

log = logging.getLogger("prunus")


@dataclass(frozen=True)
class Calibration:
    """Batches to learn from, and how to run a model on them.

    A batch is a tensor, a pair ``(inputs, targets)``, or a mapping passed as ``model(**batch)``, of
    which keys that the model does not take are for ``loss_fn`` alone. Longer tuples, such as
    ``(inputs, mask, targets)``, are taken where the model's forward says what they are: by as many
    arguments without default, or arguments called ``...mask``. Batches are copied to the model's
    device; the iterable is re-iterated for each pruning step.

    >>> batches = [(torch.randn(2, 4), torch.tensor([0, 1])) for _ in range(3)]
    >>> data = prunus.Calibration(batches, nn.functional.cross_entropy, num_batches=2)
    >>> len(list(data)), data.loss(nn.Linear(4, 2), batches[0]).shape
    (2, torch.Size([]))
    """

    batches: Iterable[Batch]
    """a DataLoader, a list: anything that can be iterated more than once"""
    loss_fn: Callable[[Any, Any], Tensor] | None = None
    """``loss_fn(output, targets)``, or for mappings ``loss_fn(output, batch)``; the mean over the
    batch. Without it, an output's own ``.loss`` is used"""
    forward: Callable[[nn.Module, Batch], Any] | None = None
    """``forward(model, batch) -> loss``, instead of all the above"""
    num_batches: int | None = None
    """use only the first so many batches"""
    memory: str | int | None = None
    """for statistics, as ``"8GiB"`` or bytes; over it, several passes over the batches are made.
    Default: four fifths of what is free"""
    told: set[str] = field(default_factory=set, init=False, repr=False, compare=False)
    """what the log has said of these batches, once"""

    def __post_init__(self) -> None:
        if isinstance(self.batches, Iterator):
            raise ValueError(
                "calibration batches can be read only once (an iterator or generator); pass a "
                "DataLoader or a list, since every pruning step reads them anew"
            )
        if self.num_batches is not None and self.num_batches < 1:
            raise ValueError(f"num_batches={self.num_batches}; use at least 1")
        if self.memory is not None:
            parse_bytes(self.memory)

    def __iter__(self) -> Iterator[Batch]:
        batches = self.batches
        if getattr(batches, "persistent_workers", False):
            # its workers serve one iteration at a time, and the user may be in the middle of his
            batches = copy.copy(batches)
            batches._iterator = None  # type: ignore[attr-defined]
        return itertools.islice(iter(batches), self.num_batches)

    def stretch(self, begin: int) -> Iterator[tuple[int, Batch]]:
        """As many batches as there are, with their numbers from 1, from the `begin`-th on.

        After the last come those from the first one up to it.
        """
        count = 0
        for count, batch in enumerate(self, 1):
            if count > begin:
                yield count, batch
        if begin >= count > 0:
            begin %= count
            yield from itertools.islice(enumerate(self, 1), begin, None)
        yield from itertools.islice(enumerate(self, 1), begin)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of a forward pass. Raises ValueError if there is none."""
        loss = self.run(model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"gradients need a loss of one number, and the calibration gave {what}; pass "
                "Calibration(batches, loss_fn) with batches of (inputs, targets), or forward="
            )
        return loss

    def run(self, model: nn.Module, batch: Batch) -> Any:
        """One forward pass: the loss where there is one, else the output."""
        with no_error_sync(when=needs_all_ranks(model)):
            return self._run(model, batch)

    def _run(self, model: nn.Module, batch: Batch) -> Any:
        if self.forward is not None:
            return self.forward(model, batch)
        call = call_of(model, batch, self.loss_fn is not None)
        args, kwargs, target = to_device(tuple(call), device_of(model), copy=True)
        output = model(*args, **kwargs)
        if self.loss_fn is not None and target is not None:
            return self.loss_fn(output, target)
        own = getattr(output, "loss", None) if isinstance(batch, Mapping) else None
        return output if own is None else own


def device_of(model: nn.Module) -> torch.device:
    """Where its first parameter with data is, or buffer; the CPU for a model that has neither."""
    places = [t.device for t in itertools.chain(model.parameters(), model.buffers())]
    cpu = torch.device("cpu")
    return next((place for place in places if place.type != "meta"), (places or [cpu])[0])


def as_calibration(value: Any) -> Calibration | None:
    """A Calibration as it is, anything else that has batches as one without a loss.

    Raises ValueError for what cannot be iterated.
    """
    if value is None or isinstance(value, Calibration):
        return value
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes, Tensor, Mapping)):
        kind = type(value).__name__
        raise ValueError(f"calibration is a {kind}; pass prunus.Calibration(batches, loss_fn)")
    return Calibration(value)


def check_first_batch(model: nn.Module, calibration: Calibration, gradients: bool) -> None:
    """Run the model on the first batch, with its loss where gradients will be taken.

    Raises ValueError if there is no batch, or the model cannot run it. What only happened not to
    be readable now (an OSError) is said in the log, since it is read anew when it is needed.
    Models that are sharded or have no data yet are not run.
    """
    target = unwrap(model)
    runs = not needs_all_ranks(model) and not any(p.is_meta for p in target.parameters())
    try:
        with undisturbed(model, calibration), torch.no_grad():
            batch = next(iter(calibration), _NOTHING)
            if batch is not _NOTHING and runs:
                calibration.loss(target, batch) if gradients else calibration.run(target, batch)
    except OSError as error:
        log.warning("the calibration data could not be tried: %s", error)
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        kind = type(error).__name__
        raise ValueError(f"calibration: its first batch cannot be used: {kind}: {error}") from error
    else:
        if batch is _NOTHING:
            raise ValueError("calibration has no batches; at least one is needed")


_NOTHING = object()


def first_pass(model: nn.Module, calibration: Calibration | None) -> Callable[[], object] | None:
    """A forward pass of the model on the first batch, for whoever wants to watch one.

    None where there is no data, or the model could not run here and now: it has no weights yet, or
    its ranks must run together.
    """
    target = unwrap(model)
    if calibration is None or needs_all_ranks(model):
        return None
    if any(is_lazy(p) or p.is_meta for p in model.parameters()):
        return None

    def run() -> None:
        with undisturbed(model, calibration), torch.no_grad():
            for batch in calibration:
                calibration.run(target, batch)
                break

    return run


def _generators(batches: Any) -> list[torch.Generator]:
    """A loader's own sources of random order, and those of its samplers."""
    found = [getattr(batches, "generator", None)]
    for name in ("sampler", "batch_sampler"):
        if (inner := getattr(batches, name, None)) is not None:
            found += _generators(inner)
    return [g for g in found if isinstance(g, torch.Generator)]


@contextlib.contextmanager
def random_states_kept() -> Iterator[None]:
    """The random states of PyTorch, Python and NumPy are afterwards what they were."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    plain, numpys = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(plain)
            np.random.set_state(numpys)


@contextlib.contextmanager
def undisturbed(model: nn.Module, calibration: Calibration) -> Iterator[None]:
    """Evaluation mode, with training modes and random states put back afterwards.

    So every pass over the calibration data begins in the same random state, and sees the same
    batches in the same order.
    """
    reshard(model)  # an evaluation may have come before
    modes = [(module, module.training) for module in model.modules()]
    generators = [(g, g.get_state()) for g in _generators(calibration.batches)]
    with random_states_kept():
        model.eval()
        try:
            yield
        finally:
            reshard(model)
            for module, mode in modes:
                module.training = mode
            for generator, state in generators:
                generator.set_state(state)
            torch.clear_autocast_cache()  # it may hold copies of weights that will be pruned


def needs_all_ranks(model: nn.Module) -> bool:
    """Whether a forward pass has collectives in it."""
    return any(map(is_sharded, model.parameters())) or any(
        isinstance(m, nn.SyncBatchNorm) for m in model.modules()
    )


def in_common(model: nn.Module, calibration: Calibration) -> Iterator[Batch]:
    """The batches; as many on every rank where a forward pass needs all ranks."""
    batches = iter(calibration)
    return lockstep(batches, all_ranks(), all_needed=True) if needs_all_ranks(model) else batches
