"""Weights that stay small while a model trains."""

from dataclasses import dataclass, field

import torch

import prunus


@prunus.register_modifier
@dataclass(frozen=True)
class Clip(prunus.Modifier):
    """Clamp all weights after each optimizer step of a window."""

    name = "toy_clip"

    limit: float = 1.0
    """largest magnitude"""
    window: prunus.Window = field(default_factory=prunus.Window)
    """when"""

    def bind(self, context):
        return ClipRun(self, context)


class ClipRun(prunus.Run):
    def __init__(self, modifier, context):
        self.limit, self.model = modifier.limit, context.model
        self.begin = modifier.window.begin(context.timeline)

    @torch.no_grad()
    def prune(self, step):
        if step > self.begin:
            for p in self.model.parameters():
                p.clamp_(-self.limit, self.limit)
