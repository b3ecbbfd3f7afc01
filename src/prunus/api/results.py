"""What pruning returns: tables that print well in a terminal and a notebook."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn

from prunus.calibration.input_dependence import CONSTANT
from prunus.core.cut_paths import cut_message
from prunus.core.default_dense_layers import dense_line
from prunus.core.layers import all_layers
from prunus.core.masks import count_zeros, local
from prunus.core.names import did_you_mean, few
from prunus.core.unseen import told, unseen_weights
from prunus.engine.method import LayerResult, collapse_message, misfits_message, unreached_messages
from prunus.engine.permute.step import FoldRow
from prunus.report.records import Recorder
from prunus.report.tables import Printable, Recorded, share, stacks

if TYPE_CHECKING:
    from prunus.recipe import Recipe


@dataclass
class Result(Recorded):
    """What a one-shot run did, layer by layer.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    >>> result = prunus.prune(model, "magnitude", sparsity=0.5)
    >>> result.sparsity, result.rows[0].zeros, result.spared
    (0.5, 32, {'1': 'writes the output'})
    """

    rows: list[LayerResult]
    masks: Mapping[str, Tensor]
    """parameter name -> keep-mask, True means kept"""
    recipe: Recipe
    spared: dict[str, str] = field(default_factory=dict)
    """layers that the default left dense, each with the reason"""
    recorder: Recorder = field(default_factory=Recorder, repr=False)
    permuted: list[FoldRow] = field(default_factory=list)
    """channel permutations that the network has taken, and what they brought"""
    not_permuted: dict[str, str] = field(default_factory=dict)
    """layer name -> why its input channels are as they were, where `permute` was asked for"""
    unseen: str = ""
    """what share of the model's weights is in parameters that are no layers, and stays dense"""
    misfits: dict[str, str] = field(default_factory=dict)
    """layer name -> why it does not fit, and was left dense, where `misfits` is `dense`"""
    constant_output: bool = False
    """whether the model's output no longer depends on its input, as far as that was tried: on the
    calibration data, not block by block"""
    outside_blocks: list[str] = field(default_factory=list)
    """of a sequential run: layers in no block, which were pruned after the blocks, all together"""
    cut: list[str] = field(default_factory=list)
    """layers of an `nn.Sequential` that read only what the ones before no longer write"""
    title = "pruned"

    @property
    def unreached(self) -> dict[str, str]:
        """Layer name -> `magnitude` or `dense`: what was done for lack of calibration data."""
        return {row.name: row.unreached for row in self.rows if row.unreached}

    @property
    def left_dense(self) -> list[str]:
        """Names of the layers that the default left dense."""
        return list(self.spared)

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
        for name, at in stacks([row.name for row in self.rows]):
            rows, row = self.rows[at], self.rows[at.start]
            shape = "x".join(map(str, row.shape))
            lost = [_highest(rows, get) for _, get in self._losses()]
            zeros, size = sum(x.zeros for x in rows), sum(x.size for x in rows)
            yield name, shape, row.pattern, share(zeros, size), f"{zeros:,}", *lost
        zeros = sum(row.zeros for row in self.rows)
        size = sum(row.size for row in self.rows)
        yield f"{len(self.rows)} layers", "", "", share(zeros, size), f"{zeros:,}"

    def notes(self) -> Sequence[str]:
        message = [dense_line(self.spared)] if self.spared else []
        message += [misfits_message(self.misfits)] if self.misfits else []
        message += unreached_messages(self.rows)
        message += [self.unseen] if self.unseen else []
        if self.outside_blocks:
            message.append(f"outside the blocks, pruned after them: {few(self.outside_blocks)}")
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


def _highest(rows: Sequence[LayerResult], get: Callable[[LayerResult], float | None]) -> str:
    found = [x for row in rows if (x := get(row)) is not None]
    return (f"{max(found):.2%}" if len(rows) == 1 else f"≤ {max(found):.2%}") if found else ""


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
        for name, at in stacks([row[0] for row in self.rows]):
            _, kind, shape, *_ = self.rows[at.start]
            size, zeros = (
                sum(counts) for counts in zip(*(row[3:] for row in self.rows[at]), strict=True)
            )
            yield name, kind, "x".join(map(str, shape)), share(zeros, size), f"{zeros:,}"
        zeros = sum(row[4] for row in self.rows)
        size = sum(row[3] for row in self.rows)
        yield f"{len(self.rows)} layers", "", "", share(zeros, size), f"{zeros:,}"


def sparsity(model: nn.Module) -> SparsityTable:
    """Zeros of every floating weight of two or more axes (of this rank's part).

    Those that prunus knows no layer for, and leaves dense, have rows too: embeddings, and the
    weights of people's own modules.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> nn.init.zeros_(model[0].weight).shape
    torch.Size([2, 2])
    >>> table = prunus.sparsity(model)
    >>> table["0"], float(table)
    (1.0, 0.5)
    """
    rows = []
    for layer in all_layers(model):
        part = layer.local
        rows.append((layer.name, layer.kind, layer.shape, part.numel(), count_zeros(part)))
    unseen = unseen_weights(model)
    for item in unseen:
        part = local(item.weight)
        shape = tuple(item.weight.shape)
        rows.append((item.name, item.kind, shape, part.numel(), count_zeros(part)))
    return SparsityTable(rows, told(model, unseen))
