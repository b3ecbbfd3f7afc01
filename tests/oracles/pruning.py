"""Slow and obvious answers."""

import os
from pathlib import Path

import torch
from torch import nn

# for programs that tests start: two thread pools on two cores wait for each other most of the time
ROOT = Path(__file__).parents[2]
SINGLE = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}


def close(actual, expected, tolerance=1e-9):
    """Raises AssertionError unless all entries agree, absolutely and relatively."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def lowest(scores, k):
    """Positions of the k lowest of a flat list, of equal ones the first."""
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    return set(order[:k])


def global_keep(tensors, k):
    """Keep-masks of tensors ranked together; ties go to the first tensor, then the first entry."""
    flat = [float(x) for t in tensors for x in t.reshape(-1)]
    drop = lowest(flat, k)
    keep = torch.tensor([i not in drop for i in range(len(flat))], dtype=torch.bool)
    parts = keep.split([t.numel() for t in tensors])
    return [part.reshape(t.shape) for part, t in zip(parts, tensors, strict=True)]


def nm_keep(scores, n, m):
    """Keep-mask of the n highest of every m consecutive columns, of equal ones the first go."""
    keep = torch.ones(scores.shape, dtype=torch.bool)
    for r, row in enumerate(scores.tolist()):
        for begin in range(0, len(row), m):
            for i in lowest(row[begin : begin + m], m - n):
                keep[r, begin + i] = False
    return keep


def small_cnn(dtype=torch.float32):
    """A stem, three kinds of layers in the middle, and a head."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1, groups=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 8, 3, padding=1),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 16),
        nn.ReLU(),
        nn.Linear(16, 4),
    ).to(dtype)


def small_mlp(dtype=torch.float32):
    return nn.Sequential(
        nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 4)
    ).to(dtype)
