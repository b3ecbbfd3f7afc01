"""Layers with correlated inputs, by their weights and Gram matrices."""

import torch
from hypothesis import settings
from hypothesis import strategies as st

FEW = settings(deadline=None, max_examples=30)
SEEDS = st.integers(0, 99)
DTYPES = st.sampled_from([torch.float32, torch.float64])


def inputs_of(rows, cols, seed=0, samples=None, zeros=0.0, dead=0):
    """Random weights, some of them zero, correlated inputs, `dead` of them zero, and the source."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
    w *= torch.rand(rows, cols, generator=generator) >= zeros
    x = torch.randn(samples or cols + 5, cols, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(cols, cols, generator=generator, dtype=torch.float64)
    x[:, torch.randperm(cols, generator=generator)[:dead]] = 0
    return w, x, generator


def problem(rows, cols, seed=0, samples=None, zeros=0.0, dead=0):
    """Those weights, the Gram matrix of the inputs, and a mask."""
    w, x, generator = inputs_of(rows, cols, seed, samples, zeros, dead)
    return w, x.T @ x, torch.rand(rows, cols, generator=generator) < 0.5


def layer(cols, seed):
    """Features with a decaying spectrum and a few channels of large values."""
    generator = torch.Generator().manual_seed(seed)
    decay = torch.arange(1, cols + 1, dtype=torch.float64).rsqrt().unsqueeze(1)
    mix = decay * torch.randn(cols, cols, generator=generator, dtype=torch.float64)
    x = torch.randn(4 * cols, cols, generator=generator, dtype=torch.float64) @ mix
    x[:, :: cols // 3] *= 10
    return torch.randn(64, cols, generator=generator, dtype=torch.float64), x.T @ x


def error(w, gram, new):
    gap = (new - w).double()
    return torch.stack([row @ gram.double() @ row for row in gap])


def slack(w, gram):
    """What rounding can do to the error of each row."""
    return 4 * torch.finfo(w.dtype).eps * (w.square() @ gram.diagonal()).double() * len(gram)
