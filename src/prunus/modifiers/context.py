"""What the runs of a session share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from prunus.calibration.calibration import Calibration
from prunus.core.layers import Layer
from prunus.core.mask_registry import Masks
from prunus.core.masks import local, zero_pruned
from prunus.core.names import few
from prunus.modifiers.optimizer_state import keeps_copies, states_of, zero_momentum
from prunus.modifiers.timing import Timeline


class MaskOwner(Protocol):
    """What a run is to its context: whose masks they are."""

    @property
    def masked_layers(self) -> Sequence[Layer]: ...


def _discard(event: dict[str, Any]) -> None:
    pass


@dataclass
class Context:
    """What runs share: the user's objects, the clock, the masks and where events are recorded.

    >>> context = prunus.Context(nn.Linear(2, 2), torch.optim.SGD([nn.Parameter(torch.ones(1))]))
    >>> len(context.masks), context.timeline.total
    (0, None)
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    timeline: Timeline = field(default_factory=Timeline)
    calibration: Calibration | None = None
    masks: Masks = field(default_factory=Masks)
    record: Callable[[dict[str, Any]], None] = _discard

    def mask(self, run: MaskOwner, layer: Layer, mask: Tensor) -> None:
        """Set a layer's mask, which the run owns from now on; what it prunes loses its momentum."""
        self.masks.put(layer, mask, run)
        zero_momentum(self.optimizer, layer, mask)

    def apply_masks(self, run: MaskOwner) -> None:
        """Zero what is pruned in the layers that the run owns, and in copies of their weights."""
        self.masks.apply(run, run.masked_layers)
        owned = self.masks.owned(run, run.masked_layers) if keeps_copies(self.optimizer) else ()
        for layer in owned:
            mask = self.masks.of(layer)
            for state in states_of(self.optimizer, layer):
                if mask is not None and state.get("z") is not None:
                    zero_pruned([layer.part(local(state["z"]))], [mask])

    def check_held(self, layers: Sequence[Layer]) -> None:
        """Raises ValueError unless the optimizer holds every weight that will be masked."""
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        missing = [layer.parameter_name for layer in layers if id(layer.weight) not in held]
        if not missing:
            return
        if any(hasattr(layer.weight, "ds_id") for layer in layers):
            raise ValueError(
                "DeepSpeed ZeRO flattens the weights, so masks cannot hold; use DDP or FSDP2"
            )
        raise ValueError(
            f"the optimizer does not hold {few(missing)}; attach the optimizer "
            "that trains these weights, built after the model was moved or sharded, or exclude them"
        )
