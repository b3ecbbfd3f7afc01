"""EIE's format: the figures of the paper and of the lecture, and any matrix there and back."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from prunus import formats
from prunus.formats.lanes import Walk


def entries_of(stored, element):
    begin = int(np.diff(stored.pointers.numpy().astype(int), axis=1)[:element].sum())
    end = begin + int(stored.pointers[element, -1])
    codes, zeros = stored.entries()
    return codes[begin:end].tolist(), zeros[begin:end].tolist()


def test_a_long_run_takes_virtual_zeros():
    column = torch.tensor([0, 0, 1, 2] + [0] * 18 + [3]).float().reshape(-1, 1)
    stored = formats.encode(column, "eie", elements=1)
    codes, zeros = stored.entries()
    assert stored.codebook[codes.astype(int)].tolist() == [1, 2, 0, 3]
    assert zeros.tolist() == [2, 0, 15, 2]
    assert stored.pointers.tolist() == [[0, 4]]


def figure_3():
    """The weights of the first of four elements in figure 3 of the paper: 16 rows, 8 columns."""
    w = torch.zeros(16, 8)
    places = [(0, 0), (8, 0), (12, 0), (4, 1), (0, 2), (12, 2), (0, 4), (4, 4)]
    for row, col in [*places, (0, 5), (12, 5), (0, 6), (8, 7), (12, 7)]:
        w[row, col] = 1.0
    return w


def test_figure_3_of_the_paper():
    stored = formats.encode(figure_3(), "eie", elements=4)
    _, zeros = entries_of(stored, 0)
    assert zeros == [0, 1, 0, 1, 0, 2, 0, 0, 0, 2, 0, 2, 0]
    assert stored.pointers[0].tolist() == [0, 3, 4, 6, 6, 8, 10, 11, 13]


def test_the_lectures_figure_counts_zeros_through_columns():
    w = torch.zeros(8, 4)
    for row, col in [(0, 0), (0, 1), (4, 2), (0, 3), (4, 3)]:
        w[row, col] = 1.0
    stored = formats.encode(w, "eie", elements=4, reset="stream")
    _, zeros = entries_of(stored, 0)
    assert zeros == [0, 1, 2, 0, 0]
    assert stored.pointers[0].tolist() == [0, 1, 2, 3, 5]


def walked(w, elements, index_bits, reset):
    """Entries as a person would write them: element by element, column by column, row by row."""
    longest = (1 << index_bits) - 1
    result = []
    for element in range(elements):
        gap, entries, pointers = 0, [], [0]
        for col in range(w.shape[1]):
            gap = 0 if reset == "column" else gap
            for value in w[element::elements, col].tolist():
                if value:
                    entries.append((value, gap))
                    gap = 0
                elif gap == longest:
                    entries.append((0.0, gap))
                    gap = 0
                else:
                    gap += 1
            while reset == "column" and entries[pointers[-1] :] and not entries[-1][0]:
                entries.pop()  # no virtual zeros after the last value
            pointers.append(len(entries))
        while entries and not entries[-1][0]:
            entries.pop()
        result.append((entries, [min(p, len(entries)) for p in pointers]))
    return result


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 6),
    elements=st.integers(1, 5),
    index_bits=st.integers(1, 4),
    density=st.sampled_from([0.02, 0.1, 0.5]),
    reset=st.sampled_from(["column", "stream"]),
    seed=st.integers(0, 99),
)
def test_entries_are_those_of_a_walk_by_hand(
    rows, cols, elements, index_bits, density, reset, seed
):
    rng = np.random.default_rng(seed)
    w = torch.from_numpy((rng.random((rows, cols)) < density) * rng.integers(1, 15, (rows, cols)))
    stored = formats.encode(w, "eie", elements=elements, index_bits=index_bits, reset=reset)
    assert torch.equal(stored.decode(), w)
    for element, (entries, pointers) in enumerate(walked(w, elements, index_bits, reset)):
        codes, zeros = entries_of(stored, element)
        values = stored.codebook[np.array(codes, int)].tolist()
        assert list(zip(values, zeros, strict=True)) == entries
        assert stored.pointers[element].tolist() == pointers
    counts = formats.entry_counts(formats.matrix_mask(w), elements, index_bits, reset)
    assert (counts == np.diff(stored.pointers.numpy().astype(int), axis=1)).all()


@pytest.mark.parametrize("density", [0.04, 0.09, 0.11, 0.25])
def test_padding_follows_the_closed_form(density):
    rng = np.random.default_rng(0)
    mask = rng.random((64 * 64, 512)) < density
    entries = formats.entry_counts(mask, 64).mean()
    assert entries == pytest.approx(formats.expected_entries(64, density), rel=0.01)


def test_published_padding_at_64_rows_an_element():
    shares = [1 - d * 64 / formats.expected_entries(64, d) for d in (0.04, 0.09, 0.1, 0.23)]
    assert shares == pytest.approx([0.359, 0.162, 0.136, 0.011], abs=0.0005)


def test_pointers_grow_where_16_bits_do_not_count_far_enough():
    w = torch.ones(300, 300)
    stored = formats.encode(w, "eie", elements=1)
    assert int(stored.pointers[0, -1]) == 90_000
    assert stored.parts()["pointers"] == 32 * 301
    assert formats.encode(w, "eie", elements=2).parts()["pointers"] == 16 * 2 * 301
    assert torch.equal(stored.decode(), w)


def test_lanes_own_every_nth_row():
    walk = Walk.of(np.ones((5, 2), bool), 2)
    assert walk.flat.tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 3, 7]
    assert walk.depths().tolist() == [3, 2]


def test_unknown_reset_and_no_elements_are_refused():
    w = torch.ones(4, 4)
    with pytest.raises(ValueError, match="reset='row'; use 'column' or 'stream'"):
        formats.encode(w, "eie", reset="row")
    with pytest.raises(ValueError, match="elements=0; use at least 1"):
        formats.encode(w, "eie", elements=0)
