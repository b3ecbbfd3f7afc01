"""Gram matrices by halves are those by the whole product."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.solvers import gram
from prunus.stats import InputGram

FEW = settings(max_examples=30, deadline=None)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(gram, "LEAF", 3)
    monkeypatch.setattr(gram, "SMALLEST", 8)


@FEW
@given(st.integers(1, 21), st.integers(0, 9), st.integers(1, 3))
def test_halves_added_up_and_mirrored_are_the_whole_product(columns, samples, parts):
    g = torch.Generator().manual_seed(columns)
    xs = [torch.randn(samples, columns, generator=g, dtype=torch.float64) for _ in range(parts)]
    total = torch.zeros(columns, columns, dtype=torch.float64)
    whole = [gram.add_gram(total, x) for x in xs]
    assert whole == parts * [columns < 8]
    if not whole[0]:
        assert (total[columns // 2 :, : columns // 2] == 0).all()  # half of the work
        gram.mirror(total)
    expected = sum(x.T @ x for x in xs)
    torch.testing.assert_close(total, expected)


def test_a_statistic_is_whole_whenever_it_is_read():
    g = torch.Generator().manual_seed(0)
    xs = [torch.randn(5, 19, generator=g, dtype=torch.float64) for _ in range(4)]
    stat, other = (InputGram(19, dtype=torch.float64) for _ in range(2))
    stat.update(xs[0])
    stat.update(xs[1])
    torch.testing.assert_close(stat.gram("cpu"), sum(x.T @ x for x in xs[:2]))
    stat.update(xs[2])
    perm = torch.randperm(19, generator=g)
    stat.permute(perm)
    stat.update(xs[3][:, perm])
    expected = sum(x.T @ x for x in xs)[perm][:, perm]
    torch.testing.assert_close(stat.norm, expected.diagonal().sqrt())
    torch.testing.assert_close(stat.gram("cpu"), expected)
    # a rank without data has the sums of the others added to its own
    for mine, theirs in zip(other.tensors(), stat.tensors(), strict=True):
        mine += theirs
    torch.testing.assert_close(other.gram("cpu"), expected)
    torch.testing.assert_close(
        other.factor(0.01, torch.device("cpu")), stat.factor(0.01, torch.device("cpu"))
    )
