"""A progress bar for what takes longer than a few seconds, and nothing for what does not."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized
from contextvars import ContextVar
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

T = TypeVar("T")
PATIENCE = 2.0  # seconds before a bar appears
_shown: ContextVar[Progress | None] = ContextVar("shown", default=None)  # one at a time can be


class Bar:
    """A line with a title, a bar and the time left; inside another one, a line below it.

    ``total`` steps, if known. Appears after `PATIENCE` seconds, on a terminal only.
    """

    def __init__(self, title: str, total: int | None = None, console: Console | None = None):
        self._outer = outer = _shown.get()
        console = console or Console(stderr=True)
        self._progress = outer or Progress(
            console=console, transient=True, disable=not console.is_terminal
        )
        self._task = self._progress.add_task(title, total=total, visible=False)
        self._begin = time.monotonic()
        _shown.set(self._progress)

    def step(self, done: int, title: str | None = None) -> None:
        """So many steps are done; from now on the line says `title`."""
        if time.monotonic() - self._begin > PATIENCE:
            self._progress.start()
            self._progress.update(self._task, visible=True)
        self._progress.update(self._task, completed=done, description=title)

    def close(self) -> None:
        _shown.set(self._outer)
        self._progress.remove_task(self._task)
        if self._outer is None:
            self._progress.stop()


def track(
    items: Iterable[T], title: str, console: Console | None = None, total: int | None = None
) -> Iterator[T]:
    """Yield the items; on a terminal, show a bar once they take longer than `PATIENCE`.

    With a `total`, known or of the items themselves, it also shows the time that is left.
    """
    bar = Bar(title, len(items) if isinstance(items, Sized) else total, console)
    try:
        for done, item in enumerate(items):
            bar.step(done)
            yield item
    finally:
        bar.close()
