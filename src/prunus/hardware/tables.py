"""A table for terminals, notebooks and pages."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font-family: system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; color: #222 }}
table {{ border-collapse: collapse; font-size: .85rem }} caption {{ text-align: left }}
td, th {{ padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #e9e9e9 }}
td:first-child, th:first-child {{ text-align: left }} img {{ max-width: 100% }}
</style></head><body><h1>{title}</h1><img src="{picture}" alt="{title}">{table}</body></html>
"""


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; the last row holds the sums."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]

    def __rich_console__(self, console: Any, options: Any) -> Any:
        table = RichTable(title=self.title, title_justify="left", box=box.SIMPLE_HEAD)
        for i, name in enumerate(self.header):
            table.add_column(Text(name), justify="right" if i else "left", no_wrap=i == 0)
        for row in self.rows[:-1]:
            table.add_row(*map(Text, row))
        table.add_section()
        table.add_row(*map(Text, self.rows[-1]))
        yield table
        yield from map(Text, self.notes)

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=150, color_system=None).print(self)
        return text.getvalue().rstrip("\n")

    def html(self) -> str:
        """A table element, and the notes as paragraphs."""

        def line(tag: str, cells: Sequence[str]) -> str:
            return f"<tr>{''.join(f'<{tag}>{html.escape(c)}</{tag}>' for c in cells)}</tr>"

        body = "".join(line("td", row) for row in self.rows)
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        caption = f"<caption>{html.escape(self.title)}</caption>"
        return f"<table>{caption}{line('th', self.header)}{body}</table>{notes}"

    def page(self, picture: str) -> str:
        """A whole page with a picture that lies beside it."""
        return _PAGE.format(title=html.escape(self.title), picture=picture, table=self.html())
