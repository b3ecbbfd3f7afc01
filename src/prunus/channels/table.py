"""A table that prints well in a terminal and a notebook."""

from __future__ import annotations

import abc
import html
import io
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


class Printed(abc.ABC):
    """Shows its columns and notes."""

    title = ""

    @abc.abstractmethod
    def header(self) -> Sequence[str]:
        """The columns' names."""

    @abc.abstractmethod
    def cells(self) -> Iterable[Sequence[str]]:
        """The rows."""

    def notes(self) -> Sequence[str]:
        return ()

    def __str__(self) -> str:
        table = Table(title=self.title, title_justify="left", box=box.SIMPLE_HEAD)
        for i, name in enumerate(self.header()):
            table.add_column(Text(name), justify="left" if i == 0 else "right", overflow="fold")
        for row in self.cells():
            table.add_row(*map(Text, row))
        text = io.StringIO()
        console = Console(file=text, width=110, color_system=None)
        console.print(table)
        for note in self.notes():
            console.print(Text(note), soft_wrap=True)
        return text.getvalue().rstrip("\n")

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"
