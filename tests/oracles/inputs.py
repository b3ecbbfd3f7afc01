"""A layer with correlated inputs, measured, scored and solved."""

import torch
from hypothesis import settings
from hypothesis import strategies as st

from prunus import ALPS, RIA, SparseGPT, Wanda
from prunus.core.patterns import parse_pattern
from prunus.core.ranks import Ranks
from prunus.stats import InputGram

from tests.oracles.gram_layers import inputs_of

FEW = settings(deadline=None, max_examples=25)

SEEDS = st.integers(0, 99)

WHOLE = Ranks()

DAMP = SparseGPT().damp

LEARNERS = [Wanda(), Wanda(swap=True, refit=True), RIA(), SparseGPT(), ALPS()]

NAMES = ["wanda", "wanda-refit", "ria", "sparsegpt", "alps"]


def problem(rows, cols, seed=0, zeros=0.0, dead=0, samples=None):
    """Weights, some of them zero, and the Gram statistic of correlated inputs, some of them dead."""
    w, x, _ = inputs_of(rows, cols, seed, samples, zeros, dead)
    return w, measured(x)


def measured(x):
    stat = InputGram(x.shape[1], dtype=torch.float64)
    stat.update(x)
    return stat


def scores(pruner, w, stat):
    return pruner.scores(w, stat, parse_pattern("unstructured"), WHOLE)


def solve(w, stat, pattern="unstructured", drop=0, pruner=None):
    return (pruner or SparseGPT()).solve(w, stat, parse_pattern(pattern), drop, WHOLE)
