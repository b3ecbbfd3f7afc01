"""Regular expressions taken apart at their ``|``."""

import logging
import re
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.core.regex_alternatives import alternatives, dead_alternatives
from prunus.core.selection import match_names


@pytest.mark.parametrize(
    ("regex", "expected"),
    [
        ("a", ["a"]),
        ("a|b(c|d)", ["a", "b(c|d)"]),
        ("(a)|(b)", ["(a)", "(b)"]),
        ("a[|]b|c", ["a[|]b", "c"]),
        (r"a\|b|c", [r"a\|b", "c"]),
        ("[]|]|b", ["[]|]", "b"]),
        ("[^]|]|b", ["[^]|]", "b"]),
        ("[(]|b", ["[(]", "b"]),
        ("a|", ["a", ""]),
    ],
)
def test_the_top_level_is_cut(regex, expected):
    assert alternatives(regex) == expected


class Word(NamedTuple):
    text: str

    def __str__(self):
        return self.text


class Sequence(NamedTuple):
    parts: tuple

    def __str__(self):
        return "".join(map(str, self.parts))


class Choice(NamedTuple):
    parts: tuple

    def __str__(self):
        return f"({'|'.join(map(str, self.parts))})"


def narrowings(tree, place=()):
    """Slow and obvious: paths of alternatives, each with the tree that has nothing but them.

    An alternative is its place in the tree and its text.
    """
    if isinstance(tree, Sequence):
        for i, part in enumerate(tree.parts):
            for path, narrow in narrowings(part, (*place, i)):
                yield path, Sequence((*tree.parts[:i], narrow, *tree.parts[i + 1 :]))
    if isinstance(tree, Choice):
        for i, part in enumerate(tree.parts):
            mine = ((*place, i), str(part))
            yield (mine,), Choice((part,))
            for path, narrow in narrowings(part, (*place, i)):
                yield (mine, *path), Choice((narrow,))


TREES = st.recursive(
    st.text("ab", min_size=1, max_size=2).map(Word),
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map(tuple).map(Choice),
        st.tuples(inner, inner).map(Sequence),
    ),
    max_leaves=6,
)


@settings(deadline=None)
@given(TREES, st.lists(st.text("ab", max_size=6), max_size=8))
def test_dead_are_those_whose_narrowing_matches_no_name(tree, names):
    dead = {
        path: not any(re.fullmatch(str(narrow), name) for name in names)
        for path, narrow in narrowings(tree)
    }
    first = [
        path[-1][1]
        for path, gone in dead.items()
        if gone and not any(dead[path[:n]] for n in range(1, len(path)))
    ]
    assert sorted(dead_alternatives(str(tree), names)) == sorted(first)


@pytest.mark.parametrize(
    "regex", ["x(a|b)*y", "x(a|b){2}", "x(a|b)?", "x(?!a|b)y", "x(?<=a|b)y", "x"]
)
def test_groups_that_are_repeated_or_look_around_are_left_alone(regex):
    assert dead_alternatives(regex, ["no"]) == []


def dead(pattern, names, caplog):
    caplog.set_level(logging.WARNING, logger="prunus")
    match_names(names, lambda name: [name], [pattern], "layer")
    return [record.args[0] for record in caplog.records]


NAMES = ["blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r"re:.*(attn.(qkv|proj)|mlp.fc\d+)", []),
        (r"re:.*(attn.([qkv]|proj)|mlp.fc\d+)", ["[qkv]"]),
        ("re:(.*attn.[qkv])|(.*mlp.fc.)", ["(.*attn.[qkv])"]),
        ("re:.*(fc1|fc3)|.*(qkv|key)", ["fc3", "key"]),
        (r"re:(.*)(fc1|fc2)|(x)\3", []),  # alone it would be no regex
        (r"re:(?P<a>.*fc)(1|(?P<b>2|3))", ["3"]),
    ],
)
def test_dead_alternatives_are_named_at_any_depth(pattern, expected, caplog):
    assert dead(pattern, NAMES, caplog) == expected
