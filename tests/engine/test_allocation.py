"""How units to drop fall to the rows of several ranks."""

from types import SimpleNamespace

import torch
from hypothesis import given
from hypothesis import strategies as st

from prunus.engine.allocation import drops_of_rows

ROWS = st.lists(st.lists(st.integers(0, 4), min_size=2, max_size=2), min_size=1, max_size=4)


@given(ROWS.filter(lambda rows: all(sum(layer) for layer in zip(*rows, strict=True))), st.data())
def test_the_first_rows_of_a_layer_lose_one_more_wherever_they_lie(rows, data):
    """``rows`` are (ranks, layers): how many rows of each layer a rank holds."""
    table = torch.tensor(rows)
    drop = data.draw(st.tuples(st.integers(0, 50), st.integers(0, 50)))
    for rank, local in enumerate(rows):
        shards = SimpleNamespace(
            world_size=len(rows), rank=rank, all_reduce=lambda _: table.clone()
        )
        expected = []
        for layer, units in enumerate(drop):
            whole, begin = int(table[:, layer].sum()), int(table[:rank, layer].sum())
            each = [units // whole + (row < units % whole) for row in range(whole)]
            expected.append(sum(each[begin : begin + local[layer]]))
        assert drops_of_rows(drop, local, shards) == expected
