"""What pruning returns: tables that print well in a terminal and a notebook."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn

from prunus.calibration.input_dependence import CONSTANT
from prunus.core.cut_paths import cut_message
from prunus.core.layers import all_layers
from prunus.core.masks import local
from prunus.core.names import did_you_mean
from prunus.core.unseen import told, unseen_weights
from prunus.engine.method import LayerResult, collapse_message
from prunus.engine.permute.step import FoldRow
from prunus.report.records import Recorder
from prunus.report.tables import Printable, Recorded, share

if TYPE_CHECKING:
    from prunus.recipe import Recipe


@dataclass
class Result(Recorded):
    """What a one-shot run did, layer by layer.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    >>> result = prunus.prune(model, "magnitude", sparsity=0.5)
    >>> result.sparsity, result.rows[0].zeros, result.left_dense
    (0.5, 32, ['1'])
    """

    rows: list[LayerResult]
    masks: Mapping[str, Tensor]
    """parameter name -> keep-mask, True means kept"""
    recipe: Recipe
    left_dense: list[str] = field(default_factory=list)
    """layers the default selection spared: the stem and the output head"""
    recorder: Recorder = field(default_factory=Recorder, repr=False)
    permuted: list[FoldRow] = field(default_factory=list)
    """channel permutations that the network has taken, and what they brought"""
    not_permuted: dict[str, str] = field(default_factory=dict)
    """layer name -> why its input channels are as they were, where `permute` was asked for"""
    unseen: str = ""
    """what share of the model's weights is in parameters that are no layers, and stays dense"""
    constant_output: bool = False
    """whether the model's output no longer depends on its input, as far as that was tried: on the
    calibration data, not block by block"""
    cut: list[str] = field(default_factory=list)
    """layers of an `nn.Sequential` that read only what the ones before no longer write"""
    title = "pruned"

    @property
    def sparsity(self) -> float:
        """Share of the pruned layers' weights that are zero."""
        return sum(row.zeros for row in self.rows) / max(1, sum(row.size for row in self.rows))

    def header(self) -> Sequence[str]:
        return (
            "layer",
            "shape",
            "pattern",
            "sparsity",
            "zeros",
            *(name for name, _ in self._losses()),
        )

    def _losses(self) -> list[tuple[str, Callable[[LayerResult], float | None]]]:
        """What is known of the layers' losses: method by method something else."""
        kinds: list[tuple[str, Callable[[LayerResult], float | None]]] = [
            ("score lost", lambda row: row.score_lost),
            ("output error", lambda row: row.error),
        ]
        return [kind for kind in kinds if any(kind[1](row) is not None for row in self.rows)]

    def cells(self) -> Iterable[Sequence[str]]:
        for row in self.rows:
            shape = "x".join(map(str, row.shape))
            lost = ["" if (x := get(row)) is None else f"{x:.2%}" for _, get in self._losses()]
            yield row.name, shape, row.pattern, share(row.zeros, row.size), f"{row.zeros:,}", *lost
        zeros = sum(row.zeros for row in self.rows)
        size = sum(row.size for row in self.rows)
        yield f"{len(self.rows)} layers", "", "", share(zeros, size), f"{zeros:,}"

    def notes(self) -> Sequence[str]:
        message = [f"left dense: {', '.join(self.left_dense)}"] if self.left_dense else []
        message += [self.unseen] if self.unseen else []
        if collapsed := [row.name for row in self.rows if row.collapsed]:
            message.append(collapse_message(collapsed))
        message += [CONSTANT] if self.constant_output else []
        message += [cut_message(self.cut)] if self.cut else []
        if self.permuted:
            before, after = (
                sum(getattr(row, key) for row in self.permuted) / len(self.permuted)
                for key in ("before", "after")
            )
            message.append(
                f"{len(self.permuted)} channel permutations: score kept {before:.2%} -> {after:.2%}"
            )
        if self.not_permuted:
            message.append(f"not permuted: {len(self.not_permuted)} layers; see .not_permuted")
        return message


@dataclass
class SparsityTable(Printable):
    """The zeros in a model as it is, of all its floating weights of two or more axes."""

    rows: list[tuple[str, str, tuple[int, ...], int, int]]
    unseen: str = ""
    """what share of the weights is in parameters that are no layers"""
    title = "sparsity"

    def notes(self) -> Sequence[str]:
        return [self.unseen] if self.unseen else []

    @property
    def total(self) -> float:
        return sum(row[4] for row in self.rows) / max(1, sum(row[3] for row in self.rows))

    def __float__(self) -> float:
        return self.total

    def __getitem__(self, name: str) -> float:
        """Sparsity of one layer. Raises KeyError with the nearest name."""
        shares = {n: zeros / max(1, size) for n, _, _, size, zeros in self.rows}
        if name not in shares:
            raise KeyError(f"no layer {name!r}{did_you_mean(name, shares)}")
        return shares[name]

    def __format__(self, spec: str) -> str:
        return format(self.total, spec) if spec else str(self)

    def header(self) -> Sequence[str]:
        return "layer", "kind", "shape", "sparsity", "zeros"

    def cells(self) -> Iterable[Sequence[str]]:
        for name, kind, shape, size, zeros in self.rows:
            yield name, kind, "x".join(map(str, shape)), share(zeros, size), f"{zeros:,}"
        zeros = sum(row[4] for row in self.rows)
        size = sum(row[3] for row in self.rows)
        yield f"{len(self.rows)} layers", "", "", share(zeros, size), f"{zeros:,}"


def sparsity(model: nn.Module) -> SparsityTable:
    """Zeros of every floating weight of two or more axes (of this rank's part).

    Those that are no Linear, convolution or attention weight, which `prune` leaves dense, have rows
    too: recurrent weights, embeddings, experts in one tensor.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> nn.init.zeros_(model[0].weight).shape
    torch.Size([2, 2])
    >>> table = prunus.sparsity(model)
    >>> table["0"], float(table)
    (1.0, 0.5)
    """
    rows = []
    for layer in all_layers(model):
        part = local(layer.weight.detach())
        zeros = part.numel() - int(part.count_nonzero())
        rows.append((layer.name, layer.kind, layer.shape, part.numel(), zeros))
    unseen = unseen_weights(model)
    for item in unseen:
        part = local(item.weight)
        zeros = part.numel() - int(part.count_nonzero())
        rows.append((item.name, item.kind, tuple(item.weight.shape), part.numel(), zeros))
    return SparsityTable(rows, told(model, unseen))
