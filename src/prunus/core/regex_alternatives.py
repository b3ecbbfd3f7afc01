"""Regular expressions taken apart at their ``|``, to tell which alternatives match nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import pairwise

_PLAIN = re.compile(r"(?!\?)|\?:|\?P<\w+>")  # how a group begins that is no look-around or flag
_QUANTIFIER = re.compile(r"[*+?{]")


def _marks(regex: str) -> Iterator[tuple[int, int, str]]:
    """Every ``(``, ``|`` and ``)`` that means one: its place, its depth, itself."""
    i, depth = 0, 0
    while i < len(regex):
        char = regex[i]
        if char == "\\":
            i += 1
        elif char == "[":
            # the first character of a class is one of it, be it the closing bracket
            i = regex.find("]", i + 2 + (regex[i + 1 : i + 2] == "^"))
            if i < 0:
                return
        elif char in "(|)":
            depth -= char == ")"
            yield i, depth, char
            depth += char == "("
        i += 1


def alternatives(regex: str) -> list[str]:
    """The top-level alternatives: ``a|b(c|d)`` -> ``a``, ``b(c|d)``."""
    bars = [i for i, depth, char in _marks(regex) if char == "|" and depth == 0]
    return [regex[a + 1 : b] for a, b in pairwise([-1, *bars, len(regex)])]


def _groups(regex: str) -> Iterator[tuple[int, int]]:
    """From where to where the contents of the outermost groups go that are neither repeated nor
    look around."""
    begin = None
    for i, depth, char in _marks(regex):
        if depth == 0 and char == "(":
            prefix = _PLAIN.match(regex, i + 1)
            begin = None if prefix is None else prefix.end()
        elif (depth, char) == (0, ")") and begin and not _QUANTIFIER.match(regex, i + 1):
            yield begin, i


def dead_alternatives(regex: str, names: list[str]) -> list[str]:
    """The alternatives, at any depth, without which the same names would match.

    Those within a dead one are not listed, nor those in groups that are repeated or look around.
    """
    found: list[str] = []

    def matches(narrowed: str) -> bool:
        try:
            return any(re.fullmatch(narrowed, name) for name in names)
        except re.error:  # it refers to a group that is gone
            return True

    def walk(text: str, within: Callable[[str], str]) -> None:
        parts = alternatives(text)
        for part in parts:
            if len(parts) > 1 and not matches(within(part)):
                found.append(part)
                continue
            for a, b in _groups(part):
                walk(part[a:b], lambda t, p=part, a=a, b=b: within(p[:a] + t + p[b:]))  # type: ignore[misc]

    walk(regex, lambda text: text)
    return found
