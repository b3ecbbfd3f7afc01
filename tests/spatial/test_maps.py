"""Kernel maps are those of a search of all pairs; grouping pads no more than it may."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus import spatial

from tests.spatial.scenes import scene


def all_pairs(x, kernel, dilation):
    """(offset, input, output) of every pair of sites, by comparing all with all."""
    places = {tuple(place): i for i, place in enumerate(x.indices.tolist())}
    offsets = list(itertools.product(*map(range, kernel)))
    result = set()
    for (b, *place), out in places.items():
        for k, offset in enumerate(offsets):
            step = [d * (o - n // 2) for o, n, d in zip(offset, kernel, dilation, strict=True)]
            other = (b, *(p + s for p, s in zip(place, step, strict=True)))
            if other in places:
                result.add((k, places[other], out))
    return result


@settings(max_examples=20, deadline=None)
@given(
    kernel=st.tuples(*[st.sampled_from([1, 3, 5])] * 3),
    dilation=st.tuples(*[st.integers(1, 2)] * 3),
    density=st.sampled_from([0.05, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_the_map_is_that_of_all_pairs(kernel, dilation, density, seed):
    x = scene((4, 3, 5), density=density, seed=seed)
    kernel_map = x.sites.submanifold(kernel, dilation)
    found = {
        (k, int(i), int(o))
        for k, (source, target) in enumerate(kernel_map.pairs)
        for i, o in zip(source, target, strict=True)
    }
    found |= {(kernel_map.centre, i, i) for i in range(len(x.features))}
    assert found == all_pairs(x, kernel, dilation)
    assert kernel_map.count == len(found)


def test_the_map_is_symmetric():
    sizes = scene(density=0.4).sites.submanifold((3, 3, 3), (1, 1, 1)).sizes
    assert sizes == sizes[::-1]
    assert sizes[13] == 0


def test_groups_close_where_padding_would_exceed_epsilon():
    sizes = [100, 90, 10, 0, 9, 90, 100]
    groups = spatial.plan_groups(sizes, epsilon=0.1)
    assert [g.offsets for g in groups] == [(0, 6, 1, 5), (2, 4)]
    assert all(g.batched for g in groups)
    assert spatial.padding_share(groups, sizes) == pytest.approx(1 - 399 / 420)
    alone = spatial.plan_groups(sizes, epsilon=0.0)
    assert [g.offsets for g in alone] == [(0, 6), (1, 5), (2,), (4,)]
    assert spatial.padding_share(alone, sizes) == 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 1000), min_size=1, max_size=27),
    st.sampled_from([0.0, 0.2, 0.5, 1.0]),
    st.integers(0, 800),
)
def test_every_offset_with_pairs_is_in_one_group(sizes, epsilon, threshold):
    groups = spatial.plan_groups(sizes, epsilon, threshold)
    offsets = sorted(o for g in groups for o in g.offsets)
    assert offsets == [i for i, s in enumerate(sizes) if s]
    for group in groups:
        assert 1 - min(sizes[o] for o in group.offsets) / group.size <= epsilon
        assert not group.batched or group.size < threshold
    assert spatial.padding_share(groups, sizes) <= epsilon


def test_epsilon_is_a_share():
    with pytest.raises(ValueError, match=r"epsilon=1.5; use 0 to 1"):
        spatial.plan_groups([1], epsilon=1.5)
