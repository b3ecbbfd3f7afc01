"""Channel permutation before N:M pruning: found from scores, folded into the network, verified."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from prunus.calibration.calibration import Calibration, undisturbed
from prunus.calibration.measurements import Measurements
from prunus.calibration.memory_plan import Rows
from prunus.core.layers import Layer, working_precision
from prunus.core.names import did_you_mean
from prunus.core.patterns import NM, Unstructured
from prunus.core.progress import track
from prunus.core.ranks import Ranks, all_ranks
from prunus.core.wrappers import unwrap
from prunus.engine.checked_calls import scores_of
from prunus.engine.layer_solve import measure, no_autocast
from prunus.engine.method import Method
from prunus.engine.permute.folds import AppliedFold, Fold, FoldPlan
from prunus.engine.permute.patterns import find_folds, with_whole_groups
from prunus.engine.permute.search import SEARCHES, kept_shares
from prunus.engine.permute.statistics import columns_of, follow, share_of_zeros
from prunus.engine.permute.verify import Inputs, first_calls, take
from prunus.engine.sequential.forwards import without_cache
from prunus.engine.unreached import left_dense, magnitudes, statistics
from prunus.pruners import ScorePruner
from prunus.stats import Statistic

log = logging.getLogger("prunus")
SHARED = ("leave", "residual", "gather")


@dataclass(frozen=True)
class Permute:
    """Regroup input channels before N:M pruning, so that less of the score is lost.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
    >>> data = prunus.Calibration([torch.randn(16, 8)])
    >>> how = prunus.Permute(search="reallocate")
    >>> result = prunus.prune(model, "wanda", pattern="2:4", permute=how, calibration=data)
    >>> result.sparsity, list(result.not_permuted)
    (0.5, ['0'])
    """

    search: str = "lsa"
    """`reallocate` deals channels to groups by their sums; `lsa` goes on from there with linear sum
    assignments"""
    shared: Literal["leave", "residual", "gather"] = "leave"
    """layers whose input others read too: left as they are, permuted together with the whole
    residual stream, or given an index to gather their input by at run time"""
    max_rows: int | None = None
    """search on so many rows of scores, evenly spaced; default: all of them"""

    def __post_init__(self) -> None:
        for value, known in ((self.search, SEARCHES), (self.shared, SHARED)):
            if value not in known:
                raise ValueError(f"permute: {value!r} is not known{did_you_mean(value, known)}")
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"permute: max_rows={self.max_rows}; use at least 1, or leave it out")

    def perm(self, scores: Tensor, n: int, m: int) -> Tensor:
        """The order of columns found for (rows, cols) scores."""
        step = 1 if self.max_rows is None else max(1, -(-len(scores) // self.max_rows))
        return SEARCHES[self.search](scores[::step], n, m).cpu()


@dataclass(frozen=True)
class FoldRow:
    """What one permutation has brought."""

    name: str
    kind: str
    channels: int
    before: float
    """share of the score that the best N:M mask kept"""
    after: float


@dataclass
class PermutationResult:
    """The permutations that a network has taken, and the statistics that have followed them."""

    rows: list[FoldRow] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    done: list[AppliedFold] = field(default_factory=list)
    measured: tuple[Measurements, Ranks] | None = None

    def undo(self) -> None:
        while self.done:
            self.done[-1].undo()
            self.done.pop()


def plan_folds(
    method: Method, layers: Sequence[Layer], model: nn.Module, permute: Permute
) -> FoldPlan:
    """What can be permuted, and for every other layer the reason.

    Raises ValueError for patterns that no permutation helps.
    """
    pattern = method.pattern
    if not isinstance(pattern, NM):
        raise ValueError(
            f"permute is for N:M patterns; pattern '{pattern}' has no order of columns"
        )
    pieces = [layer for layer in layers if layer.piece is not None]
    if thirds := [layer.name for layer in pieces if layer.is_linear]:
        raise ValueError(f"permute moves whole layers, not {thirds[0]}; name the whole layer")
    whole = [layer for layer in layers if layer.piece is None]
    plan = with_whole_groups(find_folds(model, whole, permute.shared), pattern.m)
    plan.refused.update({x.name: "it is one of several matrices in a weight" for x in pieces})
    _warn_of_zeros(plan.folds)
    return plan


def _warn_of_zeros(folds: Sequence[Fold]) -> None:
    share = share_of_zeros(reader for fold in folds for reader in fold.readers)
    if share > 0.01:  # dense weights have some, by rounding
        log.warning(
            f"permute: {share:.1%} of the weights are zero already; they move to other groups, so "
            "N:M may drop more, or less, than without permute"
        )


@torch.no_grad()
def permute_layers(
    method: Method,
    layers: Sequence[Layer],
    model: nn.Module,
    calibration: Calibration | None,
    folds: Sequence[Fold],
    permute: Permute,
) -> PermutationResult:
    """Search and apply the folds whose readers are all among the layers.

    The statistics that were measured for it follow, and serve the pruning step after it. A fold
    after which the network computes something else on any rank is taken back. All are on failure.
    """
    names = {layer.name for layer in layers}
    folds = [fold for fold in folds if {reader.name for reader in fold.readers} <= names]
    folded = PermutationResult()
    if not folds:
        return folded
    if calibration is None:
        raise ValueError(
            "permute runs the model to see that its function stays the same; pass "
            "calibration=prunus.Calibration(batches)"
        )
    measured, shards = measure(method, layers, model, calibration)
    try:
        found = _search(method, measured, shards, folds, permute)
        with all_ranks().raise_on_all_ranks():
            inputs = _scope_inputs(unwrap(model), calibration, folds)
        for fold, (perms, row) in zip(folds, found, strict=True):
            _apply(fold, perms, row, inputs, measured, folded)
    except BaseException:
        folded.undo()
        raise
    folded.measured = measured, shards
    return folded


def _importance(
    method: Method, measured: Measurements, rows: Rows, stat: Statistic | None, shards: Ranks
) -> Tensor:
    """The pruner's scores; for those that choose while they solve, magnitudes times inputs.

    Zeros for a layer that will be left dense, which has no wish for an order.
    """
    if rows.layer in measured.unreached:
        scores = magnitudes(rows)
        return scores.mul_(0) if left_dense(method, measured, rows.layer) else scores
    if isinstance(method.pruner, ScorePruner):  # of single weights, whatever group they will be in
        return scores_of(method.pruner, rows, stat, Unstructured(), shards)
    norm = None if stat is None else stat.norm
    size = working_precision(rows.matrix()).abs()
    return size if norm is None else size * norm.to(size.device)


def _search(
    method: Method, measured: Measurements, shards: Ranks, folds: Sequence[Fold], permute: Permute
) -> list[tuple[Tensor, FoldRow]]:
    """For each fold its permutations, and what they keep, from scores of one group at a time."""
    wanted = {reader.name for fold in folds for reader in fold.readers}
    scores: dict[str, list[Tensor]] = {}
    for i, group in enumerate(measured.groups):
        stats = statistics(method, measured, i)
        with shards.raise_on_all_ranks(), no_autocast(measured.shares):
            for rows in group:
                if rows.layer.name in wanted:
                    part = _importance(method, measured, rows, stats.get(rows), shards)
                    scores.setdefault(rows.layer.name, []).append(part)
        del stats
    pattern = method.pattern
    assert isinstance(pattern, NM)
    found = []
    for fold in track(folds, f"permutations: {permute.search}"):
        whole = [_whole(torch.cat(scores[r.name]), r.name, measured) for r in fold.readers]
        matrices = fold.gather_scores(whole)
        perms = torch.stack([permute.perm(m, pattern.n, pattern.m) for m in matrices])
        kept = kept_shares(matrices, perms, pattern.n, pattern.m)
        found.append((perms, FoldRow(fold.name, fold.kind, perms.numel(), *kept)))
    return found


def _whole(part: Tensor, name: str, measured: Measurements) -> Tensor:
    """The scores of all rows of a layer, which ranks may have dealt out among them."""
    if measured.everyone.group is None:
        return part
    (local_rows,) = (rows for rows in measured.shares if rows.layer.name == name)
    return measured.gathered(local_rows, part)


def _apply(
    fold: Fold,
    perms: Tensor,
    row: FoldRow,
    inputs: Inputs,
    measured: Measurements,
    folded: PermutationResult,
) -> None:
    everyone = all_ranks()
    # a list that is only iterated over has no inputs of its own
    scope = fold.scope if fold.scope in inputs else unwrap(measured.model)
    taken = AppliedFold(replace(fold, scope=scope), fold.checked(perms))
    folded.done.append(taken)  # before it begins, so that no interrupt can come between
    with everyone.raise_on_all_ranks():
        reason = _tried(taken, row, inputs)
    if refusals := int(everyone.all_reduce(torch.tensor(int(bool(reason))))):
        taken.undo()
        folded.done.pop()
        reason = reason or f"{fold.name}: refused on {refusals} other ranks; undone"
        folded.refused |= {reader.name: reason for reader in fold.readers}
        log.info("not permuted: %s: %s", fold.name, reason)
        return
    folded.rows.append(row)
    log.info("permuted %s: score kept %.4f -> %.4f", fold.name, row.before, row.after)
    _follow(fold, perms, measured)


def _tried(taken: AppliedFold, row: FoldRow, inputs: Inputs) -> str:
    """Why this rank would not take the fold, and then it is undone; else empty."""
    if row.after <= row.before:
        return "no other order keeps more of the score"
    scope = taken.fold.scope
    if scope not in inputs:
        return f"{taken.fold.name}: there is no calibration batch to verify it with"
    with without_cache(scope):
        return take(taken, *inputs[scope])


def _scope_inputs(model: nn.Module, calibration: Calibration, folds: Sequence[Fold]) -> Inputs:
    """What the folds' modules are given for the first calibration batch; nothing if there is none.

    ``model`` is unwrapped: DDP talks to the other ranks, which may have no batch.
    """
    scopes = {model, *(fold.scope for fold in folds)}
    with first_calls(scopes) as found, undisturbed(model, calibration), without_cache(model):
        for batch in calibration:
            calibration.run(model, batch)
            break
    return found


def _follow(fold: Fold, perms: Tensor, measured: Measurements) -> None:
    """Permute the statistics at hand; those that cannot follow are measured again."""
    if measured.held is None:
        return
    stats, readers = measured.held[1], {reader.name for reader in fold.readers}
    local_rows = [rows for rows in stats if rows.layer.name in readers]
    if not follow(stats, {rows: columns_of(fold, perms, rows.layer) for rows in local_rows}):
        measured.held = None
