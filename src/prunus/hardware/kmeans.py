"""K-means of numbers: Lloyd's algorithm over sorted values, a few binary searches a round."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
MOST_ROUNDS = 300


def kmeans(values: Floats, clusters: int) -> Floats:
    """(at most `clusters`,) ascending centroids, begun evenly between the extremes.

    That start keeps large weights apart, which are few and matter most (Han et al., "Deep
    Compression", section 3.2). Clusters that end empty are left out.
    """
    if clusters < 1:
        raise ValueError(f"clusters={clusters}; use at least 1")
    if not len(values):
        return np.zeros(0)
    data = np.sort(values)
    sums = np.concatenate([[0.0], np.cumsum(data)])
    centroids = np.linspace(data[0], data[-1], clusters)
    bounds = np.zeros(0, np.int64)
    for _ in range(MOST_ROUNDS):
        new = np.concatenate([[0], np.searchsorted(data, _borders(centroids)), [len(data)]])
        if np.array_equal(new, bounds):
            break
        bounds = new
        sizes = np.diff(bounds)
        means = np.diff(sums[bounds]) / np.maximum(sizes, 1)
        centroids = np.where(sizes > 0, means, centroids)
    return np.unique(centroids[np.diff(bounds) > 0])


def nearest(values: Floats, centroids: Floats) -> npt.NDArray[np.int64]:
    """The index of the nearest of ascending centroids, the upper one where two are equally near."""
    return np.searchsorted(_borders(centroids), values, side="right")


def _borders(centroids: Floats) -> Floats:
    result: Floats = (centroids[1:] + centroids[:-1]) / 2
    return result
