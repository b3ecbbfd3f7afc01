"""What was probably meant by a misspelt name, numbered ones too."""

import logging

import pytest
from torch import nn

import prunus
from prunus.core.names import did_you_mean, nearest
from prunus.core.selection import select

LAYERS = [f"blocks.{i}.{name}" for i in range(12) for name in ("fc1", "fc2")]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(2, 2), nn.Linear(2, 2)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(12))
        self.head = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("blocks.12.fc1", "blocks.11.fc1"),
        ("blocks.100.fc2", "blocks.11.fc2"),
        ("block.3.fc1", "blocks.3.fc1"),
        ("Blocks.7.FC1", "blocks.7.fc1"),
        ("blocks.3.fc3", "blocks.3.fc2"),
        ("nothing like it", None),
    ],
)
def test_the_nearest_of_numbered_names_has_the_nearest_number(word, expected):
    assert nearest(word, LAYERS) == ([] if expected is None else [expected])
    if expected:
        assert did_you_mean(word, LAYERS) == f"; did you mean {expected!r}?"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("blocks.12.fc1", "blocks.11.fc1"),
        ("block.3.fc1", "blocks.3.fc1"),
        ("blocks.*.fc", "blocks.*.fc1"),
        ("blocks.fc2", "blocks.*.fc2"),
        (r"re:blocks\.12\.fc1", "blocks.11.fc1"),
        (r"re:block\.\d+\.fc1", "blocks.*.fc1"),
        (r"re:block\.[0-9]+\.fc2$", "blocks.*.fc2"),
        ("blok.3.fc1.weight", "blocks.3.fc1"),
        ("Liner", "Linear"),
    ],
)
def test_a_pattern_that_matches_nothing_is_told_what_is_there(pattern, expected):
    for call in (lambda: select(Net(), [pattern]), lambda: select(Net(), None, [pattern])):
        with pytest.raises(ValueError, match="matches nothing; nearest: ") as caught:
            call()
        near = str(caught.value).partition("nearest: ")[2].split(", ")
        assert expected in near
        assert f"'{pattern}'" in str(caught.value)  # no backslash of it doubled
        for suggestion in near:
            assert select(Net(), [suggestion]).layers


def test_tables_of_layers_suggest_neighbours_as_well():
    with pytest.raises(KeyError, match=r"did you mean 'blocks\.11\.fc2'"):
        prunus.sparsity(Net())["blocks.12.fc2"]


def test_a_dead_alternative_is_told_as_it_was_written(caplog):
    with caplog.at_level(logging.WARNING, "prunus"):
        select(Net(), [r"re:blocks\.\d\.(fc1|fd2)"])
        prunus.prune(
            Net(),
            r"""
modifiers:
  - !ConstantPruningModifier
    params: ['re:blocks\.1\.fc1|blocks\.12\.fc']
""".replace("Constant", "GM").replace(
                "    params",
                "    start_epoch: 0\n    end_epoch: 1\n"
                "    update_frequency: 1\n    init_sparsity: 0.1\n    final_sparsity: 0.5\n    params",
            ),
        )
    assert [record.message for record in caplog.records if "alternative" in record.message] == [
        r"alternative 'fd2' of pattern 're:blocks\.\d\.(fc1|fd2)' matches nothing",
        r"alternative 'blocks\.12\.fc' of pattern 're:blocks\.1\.fc1|blocks\.12\.fc' matches nothing",
    ]


def test_weights_that_may_be_transformed_are_tried_once(monkeypatch):
    tried = []
    for place in ("selection", "default_dense_layers"):
        monkeypatch.setattr(
            f"prunus.core.{place}.is_transformed", lambda layer: bool(tried.append(layer.name))
        )
    select(Net())
    assert sorted(tried) == sorted([*LAYERS, "head"])
    select(Net(), ["blocks.0.fc1"])
    assert tried.count("blocks.0.fc1") == 2
