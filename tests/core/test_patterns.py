import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.core.patterns import NM, Block, NMAlongOutputs, Row, Unstructured, parse_pattern

from tests.oracles.pruning import global_keep


@given(st.integers(1, 6), st.integers(1, 8), st.data())
@settings(deadline=None)
def test_rows_lose_the_same_number_within_one(rows, cols, data):
    drop = data.draw(st.integers(0, rows * cols))
    scores = torch.randn(rows, cols)
    keep = Row().mask(scores, drop)
    lost = (~keep).sum(1)
    assert int(lost.sum()) == drop
    assert int(lost.max() - lost.min()) <= 1
    for row, mask in zip(scores, keep, strict=True):
        assert torch.equal(mask, global_keep([row], int((~mask).sum()))[0])


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.data())
@settings(deadline=None)
def test_blocks_go_whole_and_the_least_go_first(down, across, height, width, data):
    if height * width == 1:
        return
    scores = torch.rand(down * height, across * width, dtype=torch.float64)
    drop = data.draw(st.integers(0, down * across))
    pattern = Block(height, width)
    units = pattern.pool(scores)
    for i in range(down):
        for j in range(across):
            block = scores[i * height : (i + 1) * height, j * width : (j + 1) * width]
            assert torch.isclose(units[i, j], block.sum())
    keep = pattern.mask(units, drop)
    expected = global_keep([units], drop)[0].repeat_interleave(height, 0)
    assert torch.equal(keep, expected.repeat_interleave(width, 1))


def test_a_table_small_enough_to_check_by_eye():
    scores = torch.tensor([[1.0, 4.0, 2.0, 3.0], [8.0, 5.0, 7.0, 6.0]])
    assert Unstructured().mask(scores, 3).int().tolist() == [[0, 1, 0, 0], [1, 1, 1, 1]]
    assert Row().mask(scores, 4).int().tolist() == [[0, 1, 0, 1], [1, 0, 1, 0]]
    assert NM(1, 4).mask(scores, 0).int().tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
    assert NM(2, 4).mask(scores, 0).int().tolist() == [[0, 1, 0, 1], [1, 0, 1, 0]]
    block = Block(2, 1)
    assert block.mask(block.pool(scores), 2).int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("unstructured", Unstructured()),
        ("row", Row()),
        ("2:4", NM(2, 4)),
        ("1:4", NM(1, 4)),
        ("2:4 along outputs", NMAlongOutputs(2, 4)),
        ("4x1", Block(4, 1)),
        ("1x4", Block(1, 4)),
        ("8x8", Block(8, 8)),
    ],
)
def test_patterns_read_and_print_alike(text, pattern):
    assert parse_pattern(text) == pattern
    assert str(pattern) == text


def test_groups_along_outputs_are_those_of_the_transposed_matrix():
    assert parse_pattern("2:4  along outputs") == NMAlongOutputs(2, 4)
    assert parse_pattern("2:4 along inputs") == NM(2, 4)
    for n, m in ((1, 2), (2, 4), (1, 4), (3, 8), (1, 16)):
        scores = torch.randint(4, (3 * m, 2 * m)).float()
        mine = NMAlongOutputs(n, m).mask(scores, 0)
        assert torch.equal(mine, NM(n, m).mask(scores.T.contiguous(), 0).T)
        assert mine.is_contiguous()
        assert (mine.reshape(3, m, -1).sum(1) == n).all()
        assert NMAlongOutputs(n, m).fixed == NM(n, m).fixed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("unstructerd", "did you mean 'unstructured'"),
        ("4:4", "0 < N < M is needed"),
        ("0:4", "0 < N < M is needed"),
        ("4:4 along outputs", "0 < N < M is needed"),
        ("2:4 along output", "unknown pattern '2:4 along output'"),
        ("1x1", "is no block"),
        ("124", "unknown pattern '124'"),
    ],
)
def test_bad_patterns_say_what_is_meant(text, message):
    with pytest.raises(ValueError, match=message):
        parse_pattern(text)


def test_what_does_not_divide_is_refused_with_a_remedy():
    with pytest.raises(ValueError, match=r"2:4 does not divide 6 input channels; use 2:3 or 2:6"):
        NM(2, 4).check(8, 54, 6)
    with pytest.raises(ValueError, match="1:4 along outputs does not divide 10 outputs; use an M"):
        NMAlongOutputs(1, 4).check(10, 8, 8)
    NMAlongOutputs(1, 4).check(8, 7, 7)
    with pytest.raises(ValueError, match="block 4x1 does not divide 10 outputs"):
        Block(4, 1).check(10, 8, 8)
    NM(2, 4).check(8, 72, 8)
