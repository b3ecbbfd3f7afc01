"""A modifier written in Python equals the one that its YAML reads into."""

import pytest

import prunus
from prunus import Interval, Recipe, Window
from prunus.modifiers import MODIFIERS
from prunus.modifiers.keep import Keep
from prunus.modifiers.optimizer_groups import LearningRate
from prunus.modifiers.schedules import Schedule

NEEDED = {
    "prune": {"sparsity": 0.5},
    "acdc": {"sparsity": 0.5},
    "movement": {"sparsity": Schedule(from_=0.1, to=0.5)},
    "learning_rate": {"to": 0.1},
    "weight_decay": {"to": 0.1},
    "sparse_activations": {"layers": ["conv"]},
}
BUILT_IN = [n for n in MODIFIERS if MODIFIERS[n].__module__.startswith("prunus.")]


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("window", [None, Interval("1ep", "3ep"), Window("1ep", "3ep")])
def test_every_window_reads_back_equal(name, window):
    entry = (
        MODIFIERS[name](window=window, **NEEDED.get(name, {}))
        if name != "prune"
        else (prunus.PruningModifier(sparsity=Schedule(from_=0.1, to=0.5), window=window))
    )
    assert Recipe.load(Recipe((entry,)).to_yaml()).modifiers == (entry,)


@pytest.mark.parametrize(
    "entry",
    [
        lambda: Keep(layers=["fc"], exclude="head"),
        lambda: prunus.PruningModifier(sparsity=0.5, layers="fc", exclude=["a", "b"]),
        lambda: prunus.NMTraining(layers=["fc"], structure=["7:8", "4:8", "2:4"]),
        lambda: LearningRate(values=[0.1, 0.2], groups=[0]),
    ],
)
def test_lists_and_single_names_read_back_equal(entry):
    assert Recipe.load(Recipe((entry(),)).to_yaml()).modifiers == (entry(),)


def test_a_window_with_every_is_refused_where_an_entry_acts_at_every_step():
    with pytest.raises(
        ValueError, match="every='1ep' means nothing in an entry that acts at every"
    ):
        Keep(window=Window(every="1ep"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window": "1ep"}, r"window='1ep'; give prunus.Interval\(from_='1ep', to='3ep'\)"),
        ({"layers": [3]}, "layers takes names, not 3"),
        ({"exclude": (None,)}, "exclude takes names, not None"),
    ],
)
def test_what_is_no_window_or_name_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Keep(**values)
