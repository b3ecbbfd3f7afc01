"""The empirical Fisher matrix of a model as an object to compute with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from prunus.calibration.calibration import Calibration, first_pass
from prunus.calibration.gradient_checks import NO_GRADIENTS
from prunus.calibration.gradient_pass import measure_gradients
from prunus.calibration.measurements import budget_of, check_measurable
from prunus.calibration.memory_plan import Rows
from prunus.core.layers import Layer
from prunus.core.names import did_you_mean, few
from prunus.core.ranks import Ranks, all_ranks
from prunus.core.selection import select
from prunus.core.sharding import any_sharded
from prunus.pruners import SecondOrder
from prunus.stats import BlockFisher


class Fisher(Mapping[str, BlockFisher]):
    """Layer name -> `BlockFisher`. What takes or gives one tensor for each layer has its shape.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    >>> data = prunus.Calibration([(torch.randn(2, 4), torch.randn(2, 2))], nn.functional.mse_loss)
    >>> f = prunus.fisher(model, data, settings=prunus.OBS(block_size=2))
    >>> list(f), f.diag()["0"].shape, f.inverse_block("0", 1).shape
    (['0'], torch.Size([4, 4]), torch.Size([2, 2]))
    """

    def __init__(self, blocks: Mapping[Layer, BlockFisher]) -> None:
        self._layers = {layer.name: layer for layer in blocks}
        self._blocks = {layer.name: stat for layer, stat in blocks.items()}

    def __getitem__(self, name: str) -> BlockFisher:
        if name not in self._blocks:
            raise KeyError(f"no layer {name!r}{did_you_mean(name, self._blocks)}")
        return self._blocks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def nbytes(self) -> int:
        return sum(stat.nbytes for stat in self.values())

    def _each(self, function: Callable[[Layer, BlockFisher], Tensor]) -> dict[str, Tensor]:
        result = {}
        for name, stat in self.items():
            layer = self._layers[name]
            result[name] = layer.unmatrix(function(layer, stat), tuple(layer.local.shape))
        return result

    def diag(self) -> dict[str, Tensor]:
        """The diagonal of F, damp included, in the shapes of the weights."""
        return self._each(lambda layer, stat: stat.diag())

    def mul(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """F v, for a tensor of the weight's shape for each layer.

        Raises KeyError if a layer's is missing.
        """
        return self._each(lambda layer, stat: stat.mul(layer.matrix(v[layer.name])))

    def inverse_block(self, name: str, i: int) -> Tensor:
        """(d, d) the inverse of a layer's i-th block; blocks run along a row, then the next."""
        return self[name].inverse_block(i)


def fisher(
    model: nn.Module,
    calibration: Calibration,
    *,
    layers: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str = (),
    settings: SecondOrder | None = None,
) -> Fisher:
    """Measure the blockwise empirical Fisher matrix of a model's weights.

    ``F_b = damp I + 1/m sum_k g_k g_k^T`` for every `block_size` consecutive weights of a row
    (E. Kurtic et al., "The optimal BERT surgeon", 2022, eq. 6). ``settings`` is a pruner whose
    ``block_size``, ``num_grads``, ``damp``, ``samples``, ``device`` and ``dtype`` are taken, as of
    ``prunus.OBS(block_size=64)``. ``layers`` and ``exclude`` are those of `prune`. The model is not
    changed, nor disturbed in its training.

    Raises ValueError if it does not fit the calibration's memory, and for bad or empty data.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    >>> data = prunus.Calibration([(torch.randn(2, 4), torch.randn(2, 2))], nn.functional.mse_loss)
    >>> prunus.fisher(model, data, layers="1").diag()["1"].shape
    torch.Size([2, 4])
    """
    settings = settings or SecondOrder()
    names = (layers,) if isinstance(layers, str) else layers
    without = (exclude,) if isinstance(exclude, str) else exclude
    chosen = select(model, names, without, first_pass(model, calibration)).layers
    stats = {layer: settings.statistic(layer) for layer in chosen}
    check_measurable(stats, "fisher", calibration)
    by_rows = {Rows(layer, 0, stat.rows): stat for layer, stat in stats.items()}
    everyone = Ranks() if any_sharded(chosen) else all_ranks()
    with torch.no_grad(), all_ranks().raise_on_all_ranks():
        need = sum(stat.nbytes for stat in stats.values())
        budget = budget_of(calibration, chosen, settings.device)
        if need > budget:
            raise ValueError(
                f"the Fisher matrix takes {need:,} bytes, and the memory for it is {budget:,}; "
                "take fewer layers, a smaller block_size or fewer gradients"
            )
    with torch.no_grad(), all_ranks().raise_on_all_ranks():
        _, silent = measure_gradients(model, by_rows, calibration, everyone=everyone)
    if missed := [layer.name for layer, clause in silent.items() if clause == NO_GRADIENTS]:
        raise ValueError(f"{NO_GRADIENTS} {few(missed)}; exclude them")
    return Fisher(stats)
