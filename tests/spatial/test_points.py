"""Neighbours are those of the matrix of all distances."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus import spatial


def cloud(count, dims, seed, clustered):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(count, dims, generator=generator, dtype=torch.float64)
    if clustered:
        points = points**3 + 10 * torch.randint(0, 3, (count, 1), generator=generator)
    return points


CLOUDS = {
    "count": st.integers(1, 80),
    "dims": st.integers(2, 3),
    "seed": st.integers(0, 99),
    "clustered": st.booleans(),
}


@settings(max_examples=40, deadline=None)
@given(radius=st.sampled_from([0.05, 0.5, 3.0]), k=st.integers(1, 9), **CLOUDS)
def test_ball_query_finds_the_nearest_within_the_radius(count, dims, seed, clustered, radius, k):
    points = cloud(count, dims, seed, clustered)
    queries = cloud(20, dims, seed + 1, clustered) * 1.5
    found = spatial.ball_query(points, queries, radius, k)
    distances = torch.cdist(queries, points, compute_mode="donot_use_mm_for_euclid_dist")
    for row, distance in zip(found, distances, strict=True):
        expected = distance[distance <= radius].sort().values[:k]
        got = row[row >= 0]
        torch.testing.assert_close(distance[got], expected)
        assert len(got.unique()) == len(got)
        assert (row[len(got) :] == -1).all()


@settings(max_examples=40, deadline=None)
@given(k=st.integers(1, 9), **CLOUDS)
def test_nearest_neighbours_are_the_nearest(count, dims, seed, clustered, k):
    points = cloud(max(count, k), dims, seed, clustered)
    queries = torch.cat([points[:5], 4 * cloud(10, dims, seed + 1, clustered)])
    found = spatial.nearest_neighbours(points, queries, k)
    distances = torch.cdist(queries, points, compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(distances.gather(1, found), distances.sort(1).values[:, :k])


def test_equal_points_are_neighbours_at_no_distance():
    points = torch.zeros(4, 3)
    assert spatial.nearest_neighbours(points, points[:1], 4).sort().values.tolist() == [
        [0, 1, 2, 3]
    ]


@settings(max_examples=30, deadline=None)
@given(samples=st.integers(1, 20), **CLOUDS)
def test_farthest_point_sampling_takes_the_farthest_each_time(
    count, dims, seed, clustered, samples
):
    points = cloud(max(count, samples), dims, seed, clustered)
    chosen = spatial.farthest_point_sampling(points, samples, start=len(points) - 1)
    assert chosen[0] == len(points) - 1
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    for i in range(1, samples):
        to_chosen = distances[chosen[:i]].amin(0)
        torch.testing.assert_close(to_chosen[chosen[i]], to_chosen.max())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: spatial.ball_query(p, p, 0.0, 3), "radius=0.0; use more than 0"),
        (lambda p: spatial.ball_query(p, p, 1.0, 0), "count=0; use at least 1"),
        (lambda p: spatial.ball_query(p, p[:, :2], 1.0, 1), r"use \(N, D\) and \(M, D\)"),
        (lambda p: spatial.nearest_neighbours(p, p, 9), "k=9 of 5 points; use at most 5"),
        (lambda p: spatial.farthest_point_sampling(p, 6), "count=6 of 5 points; use 1 to 5"),
    ],
)
def test_impossible_queries_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(5, 3))
