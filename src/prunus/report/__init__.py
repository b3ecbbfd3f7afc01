"""One page about a run: ``report.html``, self-contained, and ``report.png``, from its records."""

from __future__ import annotations

import io
import os
from pathlib import Path

from prunus.core.files import atomic_write
from prunus.report.figure import STYLE, draw
from prunus.report.records import FILE, read_records
from prunus.report.summary import MOST_BARS, Summary

TEMPLATE = Path(__file__).with_name("template.html")


def write_report(directory: str | os.PathLike[str]) -> Path:
    """Read ``records.jsonl`` there and write ``report.html`` and ``report.png`` beside it.

    Returns the path of the page. Raises FileNotFoundError without records, ValueError if they are
    empty, ImportError if the extra ``report`` is not installed.
    """
    events = read_records(directory)
    if not events:
        raise ValueError(f"{FILE} in '{directory}' is empty; nothing has happened in this run yet")
    summary = Summary(events)
    try:
        picture, svg = _draw(summary)
        page = _render(summary, svg)
    except ImportError as error:
        raise ImportError(f"{error}; reports need: pip install 'prunus[report]'") from None
    with atomic_write(Path(directory) / "report.png") as draft:
        draft.write_bytes(picture)
    target = Path(directory) / "report.html"
    with atomic_write(target) as draft:
        draft.write_text(page, encoding="utf-8")
    return target


def _draw(summary: Summary) -> tuple[bytes, str]:
    """The picture as PNG and as SVG; the latter is empty if there is nothing to draw."""
    import matplotlib

    png, svg = io.BytesIO(), io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure = draw(summary)
        figure.savefig(png, format="png", dpi=150)
        figure.savefig(svg, format="svg", metadata={"Date": None})
    text = svg.getvalue()
    return png.getvalue(), text[text.index("<svg") :] if figure.axes else ""


def _render(summary: Summary, svg: str) -> str:
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(s=summary, svg=svg, many=len(summary.rows) > MOST_BARS)
