"""What became of the gradients of a pass, and when there are too many bad ones."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import Tensor

from prunus.core.layers import Layer

log = logging.getLogger("prunus")
BAD_SHARE = 0.05  # of gradients that may be NaN or infinite
ABSENT, GOOD, UNREACHED, BAD = 0.0, 1.0, 2.0, 3.0  # what became of a sample; sent as numbers


class GradientChecks:
    """Counts the gradients that are NaN or infinite, which are left out."""

    def __init__(self, layers: Sequence[Layer], expected: int) -> None:
        self.layers, self.expected = layers, expected
        self.tries, self.reached = 0, [False] * len(layers)
        self.bad = [0] * len(layers)
        self.first = [""] * len(layers)

    def add(self, flags: Tensor, where: str) -> None:
        """``flags`` (layers, samples) say what became of each."""
        self.tries += int((flags[0] != ABSENT).sum())
        for i, row in enumerate(flags.tolist()):
            self.reached[i] |= any(flag in (GOOD, BAD) for flag in row)
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

    def finish(self) -> None:
        """Raises ValueError for too many bad gradients, no data, or a layer without any."""
        if self.tries == 0:
            raise ValueError("the calibration data is empty; nothing was pruned")
        if missed := [x.name for x, met in zip(self.layers, self.reached, strict=True) if not met]:
            raise ValueError(
                f"the loss of no calibration batch depends on {', '.join(missed[:5])}; "
                "nothing was pruned: exclude them"
            )
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
