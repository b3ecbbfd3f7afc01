"""Masks against the model as it is: off ones found and put on, replaced parameters followed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from prunus.core.mask_registry import Masks
from prunus.core.masks import local
from prunus.core.names import few
from prunus.core.wrappers import is_sharded
from prunus.modifiers import Run

log = logging.getLogger("prunus")


class MaskGuard:
    """Compares what a session has masked with what is in the model by now."""

    def __init__(self, runs: Sequence[Run], masks: Masks, optimizer: torch.optim.Optimizer) -> None:
        self.runs, self.masks, self.optimizer = runs, masks, optimizer

    def sparsity(self) -> float:
        """Share of the weights that are pruned now or later which are masked and really zero."""
        sizes = {name: mask.numel() for name, mask in self.masks.items()}
        for run in self.runs:
            if run.prunes or run.trains:
                sizes |= {x.parameter_name: local(x.weight).numel() for x in run.masked_layers}
        self.rebind()
        pruned = sum(self.masks.pruned().values())
        return pruned / sum(sizes.values()) if sizes else 0.0

    def verify(self, when: str) -> dict[str, int]:
        """Put masks back on where weights that are pruned are not zero; a warning says where.

        Returns how many weights of each parameter were off. Raises ValueError as `rebind` does.
        """
        self.rebind()
        soft = {x.parameter_name for run in self.runs if run.soft for x in run.masked_layers}
        off = self.masks.off(soft)
        if off:
            log.warning(
                "%s: %d pruned weights were not zero, in %s; they are zero again. Were weights "
                "loaded, or written by something other than this optimizer?",
                when,
                sum(off.values()),
                few([f"{name} ({count})" for name, count in off.items()]),
            )
            self.masks.put_on(off)
        return off

    def rebind(self) -> None:
        """Follow parameters that were replaced.

        Raises ValueError for one that is computed by now, or has another shape.
        """
        for layer in (layer for run in self.runs for layer in run.masked_layers):
            present = layer.present
            if present is layer.weight or (is_sharded(layer.weight) and present is not None):
                continue  # FSDP2 shows gathered copies at times
            if present is None or present.shape != layer.weight.shape:
                what = "is computed by something else" if present is None else "has another shape"
                raise ValueError(
                    f"{layer.parameter_name} {what} since the session was attached, so its mask "
                    "cannot hold; close the session before adding parametrizations or replacing "
                    "layers, and attach anew"
                )
            held = any(present is p for g in self.optimizer.param_groups for p in g["params"])
            log.warning(
                "%s was replaced by another parameter; its mask goes with the new one%s",
                layer.parameter_name,
                "" if held else ", which this optimizer does not train",
            )
            layer.rebind(cast("nn.Parameter", present))
            self.masks.rebind(layer)
