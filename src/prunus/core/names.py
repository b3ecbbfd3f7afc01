"""Names people type: registries of classes, and what was probably meant by a misspelt one."""

from __future__ import annotations

import difflib
import re
from abc import ABCMeta
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

from prunus.core.extension import complete
from prunus.core.plugins import load_plugins

T = TypeVar("T")


def few(names: Sequence[str], most: int = 3) -> str:
    """``a, b, c and 7 more``."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


_NUMBER = re.compile(r"\b\d+\b|\*")


def nearest(
    word: str, names: Iterable[str], most: int = 1, cutoff: float = 0.6, globs: bool = False
) -> list[str]:
    """The names most like a word; of numbered ones (``blocks.7.fc1``) that of the nearest number.

    With ``globs`` a ``*`` that stands for a number stays one, and stands where numbers are missing.

    >>> from prunus.core.names import nearest
    >>> layers = [f"blocks.{i}.{name}" for i in range(12) for name in ("fc1", "fc2")]
    >>> nearest("block.12.fc1", layers), nearest("block.*.fc1", layers, 2, globs=True)
    (['blocks.11.fc1'], ['blocks.*.fc1', 'blocks.*.fc2'])
    """
    frames: dict[str, list[str]] = {}
    for name in names:
        frames.setdefault(_frame(name), []).append(name)
    wanted = _NUMBER.findall(word)
    near = difflib.get_close_matches(_frame(word), frames, most, cutoff)
    return [_with_numbers(wanted, frames[frame], globs) for frame in near]


def _frame(name: str) -> str:
    """What stands around the numbers; a name that is nothing but a number is itself."""
    frame = _NUMBER.sub("*", name).casefold()
    return name if frame == "*" else frame


def _with_numbers(wanted: Sequence[str], names: Sequence[str], globs: bool) -> str:
    """Of names that differ in their numbers, that with the nearest ones."""
    if len(wanted) != len(_NUMBER.findall(names[0])):
        return _NUMBER.sub("*", names[0]) if globs and len(names) > 1 else names[0]

    def distance(name: str) -> int:
        pairs = zip(_NUMBER.findall(name), wanted, strict=True)
        return sum(abs(int(a) - int(b)) for a, b in pairs if "*" not in (a, b))

    marks = iter(wanted if globs else ())
    return _NUMBER.sub(lambda m: "*" if next(marks, "") == "*" else m[0], min(names, key=distance))


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """A closing clause for an error: ``; did you mean 'cap'?`` or ``; one of: cap, obs``.

    Of more than ten options only the first are listed.
    """
    options = list(options)
    if near := nearest(str(word), options):
        return f"; did you mean {near[0]!r}?"
    more = f" and {len(options) - 10} more" if len(options) > 10 else ""
    return f"; one of: {', '.join(sorted(options)[:10])}{more}" if options else ""


def check_choice(argument: str, value: object, options: Sequence[str]) -> None:
    """Raises ValueError, with the nearest option, for a value that is none of them."""
    if value not in options:
        near = did_you_mean(str(value), options)
        raise ValueError(f"{argument}={value!r} is not known{near}")


class Registry(Mapping[str, type[T]], Generic[T]):
    """Classes by the name a recipe uses. Indexing by an unknown name suggests the nearest.

    Classes derive from `base`, or have what it ``needs`` and get the rest from there.
    """

    def __init__(self, kind: str, base: ABCMeta | None = None, needs: Sequence[str] = ()) -> None:
        self.kind, self.base, self.needs = kind, base, needs
        self._classes: dict[str, type[T]] = {}

    def add(self, name: str, cls: type[T]) -> None:
        """Raises ValueError for half a class, and if another one holds the name already.

        A class of the same module and name takes the place of the one before, as in a notebook.
        """
        if self.base is not None:
            complete(cls, self.base, self.kind, self.needs)
        taken = self._classes.get(name)
        if taken is not None and _place(taken) != _place(cls):
            raise ValueError(
                f"{self.kind} {cls.__qualname__}: the name {name!r} is taken by {_place(taken)}; "
                "give it another"
            )
        self._classes[name] = cls

    def __getitem__(self, name: str) -> type[T]:
        load_plugins()
        if name not in self._classes:
            raise ValueError(f"unknown {self.kind} {name!r}{did_you_mean(name, self._classes)}")
        return self._classes[name]

    def __contains__(self, name: object) -> bool:
        load_plugins()
        return name in self._classes

    def __iter__(self) -> Iterator[str]:
        load_plugins()
        return iter(sorted(self._classes))

    def __len__(self) -> int:
        load_plugins()
        return len(self._classes)


def _place(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
