"""Names people type: registries of classes, and what was probably meant by a misspelt one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Generic, TypeVar

T = TypeVar("T")


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """A closing clause for an error: ``; did you mean 'cap'?`` or ``; one of: cap, obs``.

    Of more than ten options only the first are listed.
    """
    options = list(options)
    folded = {option.casefold(): option for option in options}
    near = difflib.get_close_matches(str(word).casefold(), folded, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {folded[near[0]]!r}?"
    more = f" and {len(options) - 10} more" if len(options) > 10 else ""
    return f"; one of: {', '.join(sorted(options)[:10])}{more}" if options else ""


class Registry(Mapping[str, type[T]], Generic[T]):
    """Classes by the name a recipe uses. Indexing by an unknown name suggests the nearest."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._classes: dict[str, type[T]] = {}

    def add(self, name: str, cls: type[T]) -> None:
        """Raises ValueError if another class holds the name already."""
        taken = self._classes.get(name)
        if taken is not None and taken.__qualname__ != cls.__qualname__:
            raise ValueError(f"{self.kind} {name!r} is taken by {taken.__qualname__}; rename yours")
        self._classes[name] = cls

    def __getitem__(self, name: str) -> type[T]:
        if name not in self._classes:
            raise ValueError(f"unknown {self.kind} {name!r}{did_you_mean(name, self._classes)}")
        return self._classes[name]

    def __contains__(self, name: object) -> bool:
        return name in self._classes

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._classes))

    def __len__(self) -> int:
        return len(self._classes)
