"""How to prune block by block: which blocks, and where they are meanwhile."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sequential:
    """How to prune block by block, and where the blocks are meanwhile.

    >>> blocks = [nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2)]
    >>> model = nn.Sequential(*blocks)
    >>> data = prunus.Calibration([torch.randn(8, 4)])
    >>> how = prunus.Sequential(device="cpu")
    >>> prunus.prune(
    ...     model, "wanda", sparsity=0.5, layers="*", sequential=how, calibration=data
    ... ).sparsity
    0.5
    """

    blocks: str | None = None
    """name of the list of blocks, as `model.layers`; default: all lists, an encoder's and a
    decoder's, in the order in which the model calls them"""
    device: str | None = None
    """where the block is that is worked on; default: where the model is"""
    weights: str | None = None
    """a safetensors file, or a folder of them: for a model on the meta device, of which one block
    at a time is read; needs `folder`"""
    folder: str | None = None
    """where each finished block is written; a run that was killed goes on from there"""

    @classmethod
    def of(cls, value: bool | str | Sequential) -> Sequential | None:
        """What recipes and calls may write: the list's name, or true to walk all."""
        if isinstance(value, Sequential) or not value:
            return value or None
        return cls(None if value is True else value)

    def __post_init__(self) -> None:
        if self.weights is not None and self.folder is None:
            raise ValueError(
                "sequential: weights are read block by block; say in which folder to "
                "write the pruned ones, as folder='pruned'"
            )
        try:
            torch.device(self.device or "cpu")
        except RuntimeError:
            raise ValueError(
                f"sequential: device={self.device!r} is none; use 'cuda', 'cuda:1' or 'cpu'"
            ) from None
