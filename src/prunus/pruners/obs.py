"""Optimal brain surgery with a blockwise empirical Fisher (oBERT).

E. Kurtic, D. Campos, T. Nguyen, E. Frantar, M. Kurtz, B. Fineran, M. Goin, D. Alistarh, "The
optimal BERT surgeon: scalable and accurate second-order pruning for large language models", 2022,
https://arxiv.org/abs/2203.07259, eq. 3-6.

Here the Fisher is accumulated in products of many gradients and inverted once, in float64; the
paper updates the inverse for each gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prunus.core.patterns import Block, Pattern
from prunus.core.ranks import Ranks
from prunus.pruners._second_order import SecondOrder
from prunus.pruners.base import ScorePruner, register_pruner
from prunus.solvers.obs import first_order_step, saliency
from prunus.stats.block_fisher import BlockFisher


@register_pruner
@dataclass(frozen=True)
class OBS(SecondOrder, ScorePruner):
    """Remove the weights whose loss, after the others adjust, rises least: ``w^2 / 2 [F^-1]_ii``.

    A block Q of a pattern scores ``1/2 w_Q^T ([F^-1]_QQ)^-1 w_Q``. What stays moves by
    ``-F^-1 (w_P / diag(F^-1)_P)`` for the weights P that went.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> batches = [(torch.randn(4, 8), torch.randn(4, 2)) for _ in range(4)]
    >>> data = prunus.Calibration(batches, nn.functional.mse_loss)
    >>> prunus.prune(model, prunus.OBS(block_size=4), sparsity=0.5, calibration=data).sparsity
    0.5
    """

    name: ClassVar[str] = "obs"
    allocator: ClassVar[str] = "global"

    damp: float = 1e-6
    """added to the diagonal; absolute, so it means something else for batches of another size"""

    def scores(self, w: Tensor, stat: BlockFisher, pattern: Pattern, ranks: Ranks) -> Tensor:
        group = pattern.cols if isinstance(pattern, Block) else 1
        return stat.per_block(lambda f, x: saliency(f.inverse(), x.double(), group), w)

    def rebuild(self, w: Tensor, stat: BlockFisher, mask: Tensor) -> Tensor:
        if bool(mask[w != 0].all()):
            return w
        return stat.per_block(
            lambda f, x, keep: first_order_step(f.inverse(), x.double(), keep), w, mask
        )
