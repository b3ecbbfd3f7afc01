"""What the search for channel permutations costs, 2:4, beside the program as published.

- scores of one linear sum assignment for a 2048x2048 layer, against the loop that sorts M columns
  for every pair of a group and a column, all columns of a group in one call (Y. Zhang et al.,
  "Plug-and-play", https://openreview.net/forum?id=Tr0lPx9woF), and against one torch.cdist. Its
  groups all cost the same, so a few are timed and multiplied.
- the permutation of a 4096x4096 layer from start to end, and where the time goes.

    python -m research.benchmarks.permutation_speed [--rounds 3] [--device cuda] [--rows 11008]
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor

from prunus.engine.permute import search

from research.benchmarks.measure import add_options, hardware, print_table, seconds

N, M, SAMPLE = 2, 4, 8  # groups of which the published loop is timed


def layer(rows: int, cols: int, device: str) -> Tensor:
    """Wanda's scores of a random layer behind inputs whose norms differ as those of real ones do.

    Columns differ by a log-normal factor, as the channels of a language model's inputs.
    """
    generator = torch.Generator().manual_seed(0)
    norms = torch.randn(cols, generator=generator).mul(0.7).exp()
    return (torch.randn(rows, cols, generator=generator).abs() * norms).to(device)


def published_scores(scores: Tensor, perm: Tensor, lane: int, groups: range) -> Tensor:
    """(len(groups), all groups): every column of the lane beside the others of a group, sorted."""
    lanes = perm.view(-1, M)
    rows = []
    for g in groups:
        at = torch.empty_like(lanes)
        at[:, 0] = lanes[:, lane]
        at[:, 1:] = lanes[g, [i for i in range(M) if i != lane]]
        together = scores[:, at]  # (rows, groups, M)
        rows.append(together.sort(dim=-1).values[..., M - N :].sum(-1).sum(0))
    return torch.stack(rows)


def cdist_scores(scores: Tensor, perm: Tensor, lane: int) -> Tensor:
    """The same for all pairs by ``max(0, a - b) = (|a - b| + a - b) / 2``."""
    columns = scores[:, perm].T.contiguous().view(-1, M, len(scores))
    others = [i for i in range(M) if i != lane]
    best = columns[:, others].sort(dim=1, descending=True).values[:, :N]
    kth, joining = best[:, -1].contiguous(), columns[:, lane].contiguous()
    apart = torch.cdist(kth, joining, p=1).double()
    last, joined = kth.sum(1, dtype=torch.float64), joining.sum(1, dtype=torch.float64)
    kept = best.sum((1, 2), dtype=torch.float64)
    return kept.unsqueeze(1) + (apart + joined - last.unsqueeze(1)) / 2


def middle(run: Callable[[], object], args: argparse.Namespace, rounds: int) -> float:
    return statistics.median(seconds(run, args) for _ in range(rounds))


def bench_scores(args: argparse.Namespace) -> None:
    size = 2048
    scores = layer(size, size, args.device)
    perm = search.reallocate(scores, N, M)
    groups = range(0, size // M, size // M // SAMPLE)
    mine = middle(lambda: search.gains(scores, perm, 0, N, M), args, args.rounds)
    loop = middle(lambda: published_scores(scores, perm, 0, groups), args, args.rounds)
    loop *= size / M / len(groups)
    cdist = middle(lambda: cdist_scores(scores, perm, 0), args, args.rounds)
    exact = published_scores(scores.double(), perm, 0, groups)
    ours = search.gains(scores, perm, 0, N, M)[list(groups)]
    theirs = published_scores(scores, perm, 0, groups)
    other = cdist_scores(scores, perm, 0)[list(groups)]
    errors = [f"{float(((t - exact) / exact).abs().max()):.1e}" for t in (ours, theirs, other)]
    print(
        f"Scores of one assignment, {size}x{size}; the loop's time is {size // M // len(groups)} "
        f"times that of {len(groups)} of its {size // M} groups\n"
    )
    rows = [
        ("prunus", f"{mine:.3f}", "1", errors[0]),
        ("published loop", f"{loop:.3f}", f"{loop / mine:.0f} (goal 50)", errors[1]),
        ("one cdist", f"{cdist:.3f}", f"{cdist / mine:.1f}", errors[2]),
    ]
    print_table(("scores", "s", "over prunus", "relative error"), rows)


@contextmanager
def timed(names: list[str], args: argparse.Namespace) -> Iterator[dict[str, float]]:
    """Seconds spent in functions of the search while this is open."""
    spent: dict[str, float] = defaultdict(float)

    def watched(name: str) -> Callable[..., object]:
        real = getattr(search, name)

        def call(*given: object, **named: object) -> object:
            results = []
            spent[name] += seconds(lambda: results.append(real(*given, **named)), args)
            return results[0]

        return call

    with ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(search, name, watched(name)))
        yield spent


def bench_layer(args: argparse.Namespace) -> None:
    scores = layer(args.rows, args.cols, args.device)
    parts = ["reallocate", "gains", "linear_sum_assignment", "retained"]
    runs = []
    for _ in range(args.rounds):
        with timed(parts, args) as spent:
            spent["in all"] = seconds(lambda: search.assign(scores, N, M), args)
        runs.append(spent)
    time = {name: statistics.median(run[name] for run in runs) for name in (*parts, "in all")}
    print(f"Permutation of a {args.rows}x{args.cols} layer, all lanes (goal: under 60 s)\n")
    rows = [(name, f"{s:.2f}", f"{100 * s / time['in all']:.0f}%") for name, s in time.items()]
    print_table(("part", "s", "share"), rows)
    orders = {
        "as it was": None,
        "reallocate": search.reallocate(scores, N, M),
        "lsa": search.assign(scores, N, M),
    }
    whole = float(scores.sum(dtype=torch.float64))
    kept = [
        (name, f"{100 * search.retained(scores, N, M, perm) / whole:.2f}%")
        for name, perm in orders.items()
    ]
    print_table(("order", "score kept"), kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_options(parser)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--cols", type=int, default=4096)
    args = parser.parse_args()
    print(hardware(args), "\n")
    bench_scores(args)
    bench_layer(args)


if __name__ == "__main__":
    main()
