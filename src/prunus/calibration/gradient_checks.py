"""What became of the gradients of a pass, and when there are too many bad ones."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunus.core.layers import Layer
from prunus.core.ranks import Ranks, all_ranks

log = logging.getLogger("prunus")
NO_GRADIENTS = "the loss of no calibration batch depends on"
ZERO_GRADIENTS = "all gradients are zero of"
BAD_SHARE = 0.05  # of gradients that may be NaN or infinite
# what became of a sample, sent as numbers; of what ranks say of their rows the highest counts
ABSENT, NONE, ZERO, GOOD, BAD = 0.0, 1.0, 2.0, 3.0, 4.0


@contextlib.contextmanager
def counted_inputs(layers: Sequence[Layer]) -> Iterator[dict[Layer, list[int]]]:
    """For each layer how often its module was called, and with how many entries in all."""
    sizes = {layer: [0, 0] for layer in layers}

    def hook(layer: Layer) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            sizes[layer][0] += 1
            sizes[layer][1] += given[0].numel() if given else 1

        return count

    with contextlib.ExitStack() as stack:
        for layer in layers:
            handle = layer.module.register_forward_pre_hook(hook(layer), with_kwargs=True)
            stack.callback(handle.remove)
        yield sizes


class GradientChecks:
    """Counts gradients that are NaN or infinite, which are left out, and those that tell nothing.

    ``ranks`` are those whose gradients are counted apart and added up in the end.
    """

    def __init__(self, layers: Sequence[Layer], expected: int, ranks: Ranks) -> None:
        self.layers, self.expected, self.ranks = layers, expected, ranks
        self.tries, self.reached = 0, [False] * len(layers)
        self.zero = [False] * len(layers)
        self.bad = [0] * len(layers)
        self.first = [""] * len(layers)

    def add(self, flags: Tensor, where: str) -> None:
        """``flags`` (layers, samples) say what became of each."""
        self.tries += int((flags[0] != ABSENT).sum())
        for i, row in enumerate(flags.tolist()):
            self.reached[i] |= any(flag in (GOOD, BAD) for flag in row)
            self.zero[i] |= ZERO in row
            if count := row.count(BAD):
                self.bad[i] += count
                self.first[i] = self.first[i] or where
            if self.bad[i] > BAD_SHARE * self.expected:
                self._refuse(i)

    def _refuse(self, i: int) -> None:
        raise ValueError(
            f"{self.bad[i]} of {self.tries} gradients of {self.layers[i].name} are NaN or "
            f"infinite, the first from {self.first[i]}; nothing was pruned: look at that batch, "
            "and at the loss in evaluation mode"
        )

    def finish(self, inputs: Mapping[Layer, Sequence[int]]) -> dict[Layer, str]:
        """The layers of which no gradient was more than zeros on any rank, and how that is.

        The loss does not depend on those without any gradient, nor on those that were called with
        nothing, as experts are that no token is sent to. Others had inputs, and zeros for
        gradients: a branch that begins at zero. Raises ValueError for too many bad gradients, and
        for no data.
        """
        with self.ranks.raise_on_all_ranks():
            if self.tries == 0:
                raise ValueError("the calibration data is empty; nothing was pruned")
            self._check_bad()
        counted = torch.tensor([self.reached, self.zero], dtype=torch.int64)
        reached, zero = self.ranks.all_reduce(counted).tolist()
        calls = all_ranks().all_reduce(torch.tensor([inputs[x] for x in self.layers])).tolist()
        found = {}
        for layer, met, zeros, (called, entries) in zip(
            self.layers, reached, zero, calls, strict=True
        ):
            if not met:
                silent = zeros and (entries or not called)
                found[layer] = ZERO_GRADIENTS if silent else NO_GRADIENTS
        return found

    def _check_bad(self) -> None:
        for i, count in enumerate(self.bad):
            if count > BAD_SHARE * self.tries:
                self._refuse(i)
        if worst := max(self.bad):
            i = self.bad.index(worst)
            log.warning(
                "%d of %d gradients of %s were NaN or infinite and left out, the first from %s",
                worst,
                self.tries,
                self.layers[i].name,
                self.first[i],
            )
        if self.tries < self.expected:
            log.info(
                "num_grads=%d, and the calibration data gave %d gradients",
                self.expected,
                self.tries,
            )
