"""Results that show themselves as tables, in a terminal and in a notebook."""

from __future__ import annotations

import abc
import html
import io
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from prunus.report.records import Recorder, is_main


def share(part: int, whole: int) -> str:
    """``part / whole`` to four places; 1.0000 only where nothing is left."""
    text = f"{part / max(1, whole):.4f}"
    return "0.9999" if text == "1.0000" and part < whole else text


def stacks(names: Sequence[str]) -> Iterator[tuple[str, slice]]:
    """Names in turn; those of more than four experts or groups of one weight as ``up[0..127]``."""
    at = 0
    for base, some in itertools.groupby(names, lambda name: _NUMBER.sub("", name)):
        alike = list(some)
        if len(alike) > 4:
            yield f"{base}[{_number(alike[0])}..{_number(alike[-1])}]", slice(at, at + len(alike))
        else:
            yield from ((name, slice(at + i, at + i + 1)) for i, name in enumerate(alike))
        at += len(alike)


_NUMBER = re.compile(r"\[\d+\]$")


def _number(name: str) -> str:
    return name.rpartition("[")[2].removesuffix("]")


class Printable(abc.ABC):
    """Shows its table: ``print(x)``, rich, and HTML in a notebook."""

    title = ""

    @abc.abstractmethod
    def header(self) -> Sequence[str]:
        """The columns' names."""

    @abc.abstractmethod
    def cells(self) -> Iterable[Sequence[str]]:
        """The rows."""

    def notes(self) -> Sequence[str]:
        return ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(title=self.title, title_justify="left", box=box.SIMPLE_HEAD)
        for i, name in enumerate(self.header()):
            justify: Literal["left", "right"] = "left" if i == 0 else "right"
            table.add_column(Text(name), justify=justify, overflow="fold")
        for row in self.cells():  # Text, for in a str `attn.qkv[q]` ends with markup
            table.add_row(*map(Text, row))
        yield table
        yield from map(Text, self.notes())

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=100, color_system=None).print(self)
        return text.getvalue().rstrip("\n")

    def _repr_html_(self) -> str:
        def line(tag: str, cells: Iterable[str]) -> str:
            inside = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
            return f"<tr>{inside}</tr>"

        body = "".join(line("td", row) for row in self.cells())
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes())
        caption = html.escape(self.title)
        return (
            f"<table><caption>{caption}</caption>{line('th', self.header())}{body}</table>{notes}"
        )


class Recorded(Printable):
    """A result with the events that led to it."""

    recorder: Recorder

    def report(self, directory: str | os.PathLike[str]) -> None:
        """Write ``records.jsonl``, ``report.html`` and ``report.png`` there."""
        from prunus.report import write_report

        self.recorder.save(directory)
        if is_main():
            write_report(directory)
