"""A layer with correlated inputs, measured, scored and solved."""

import torch
from hypothesis import settings
from hypothesis import strategies as st

from prunus import ALPS, RIA, SparseGPT, Wanda
from prunus.core.patterns import parse_pattern
from prunus.core.ranks import Ranks
from prunus.stats import InputGram

FEW = settings(deadline=None, max_examples=25)

SEEDS = st.integers(0, 99)

WHOLE = Ranks()

DAMP = SparseGPT().damp

LEARNERS = [Wanda(), Wanda(swap=True, refit=True), RIA(), SparseGPT(), ALPS()]

NAMES = ["wanda", "wanda-refit", "ria", "sparsegpt", "alps"]


def problem(rows, cols, seed=0, zeros=0.0, dead=0, samples=None):
    """Weights, some of them zero, and the Gram statistic of correlated inputs, some of them dead."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
    w *= torch.rand(rows, cols, generator=generator) >= zeros
    x = torch.randn(samples or cols + 5, cols, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(cols, cols, generator=generator, dtype=torch.float64)
    x[:, torch.randperm(cols, generator=generator)[:dead]] = 0
    return w, measured(x)


def measured(x):
    stat = InputGram(x.shape[1], dtype=torch.float64)
    stat.update(x)
    return stat


def scores(pruner, w, stat):
    return pruner.scores(w, stat, parse_pattern("unstructured"), WHOLE)


def solve(w, stat, pattern="unstructured", drop=0, pruner=None):
    return (pruner or SparseGPT()).solve(w, stat, parse_pattern(pattern), drop, WHOLE)
