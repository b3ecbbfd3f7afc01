"""A progress bar for what takes longer than a few seconds, and nothing for what does not."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

T = TypeVar("T")
PATIENCE = 2.0  # seconds before a bar appears


def track(
    items: Iterable[T], title: str, console: Console | None = None, total: int | None = None
) -> Iterator[T]:
    """Yield the items; on a terminal, show a bar once they take longer than `PATIENCE`.

    With a `total`, known or of the items themselves, it also shows the time that is left.
    """
    console = console or Console(stderr=True)
    total = len(items) if isinstance(items, Sized) else total
    progress = Progress(console=console, transient=True, disable=not console.is_terminal)
    begin, task = time.monotonic(), None
    try:
        for done, item in enumerate(items):
            if task is None and time.monotonic() - begin > PATIENCE:
                progress.start()
                task = progress.add_task(title, total=total)
            if task is not None:
                progress.update(task, completed=done)
            yield item
    finally:
        progress.stop()
